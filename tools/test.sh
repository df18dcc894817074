#!/usr/bin/env bash
# Sets up the environment of checks and tests, then runs them. Ends with non-zero status on failure.
#
#   bash tools/test.sh                   lint, format, types and the whole suite: what CI runs
#   bash tools/test.sh check             lint, format and types alone
#   bash tools/test.sh fast              the checks and tests/unit: under two minutes
#   bash tools/test.sh TIER [ARGUMENTS]  one tier: unit, process, system, slurm or gpu
#   bash tools/test.sh ARGUMENTS         anything else goes to pytest: tests/unit/test_core.py -k lease
#
# TIER and ARGUMENTS run in one pytest process, without the checks. The whole suite runs in as many
# pytest workers as NUM_WORKERS says (default 2; 3 is faster on two cores, but deadlines may be missed).
# Two environments are built once (tools/setup_env.sh). tests/slurm needs Slurm's daemons, which are
# installed where this user may run apt-get; elsewhere these tests are skipped.
set -euo pipefail
cd "$(dirname "$0")/.."

slurm_packages=(slurmctld slurmd slurm-client munge)
# the longest files first, so that the last ones to run are short
tiers=(tests/slurm tests/system tests/process tests/gpu tests/unit)
workers=(-n "${NUM_WORKERS:-2}" --dist loadfile --no-loadscope-reorder)

set_up_python() {
  local environments
  environments=$(bash tools/setup_env.sh)
  eval "$environments"
  export MEGATRON_ASYNC_RL_ENGINE_PYTHON
  export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
  unset PYTHONDONTWRITEBYTECODE  # each process would compile the whole package again
  python=$MEGATRON_ASYNC_RL_PYTHON
}

set_up_slurm() {
  local program log
  for program in munged slurmctld slurmd sbatch; do
    PATH=$PATH:/usr/sbin command -v "$program" > /dev/null || break
    [[ $program != sbatch ]] || return 0
  done
  if [[ $(id -u) != 0 ]] || ! command -v apt-get > /dev/null; then
    echo "test.sh: skips tests/slurm: to install ${slurm_packages[*]} needs root and apt-get" >&2
    return 0
  fi
  log=$(mktemp)
  if ! install_slurm > "$log" 2>&1; then
    echo "test.sh: skips tests/slurm: apt-get failed: $(tail -n 1 "$log")" >&2
  fi
  rm -f "$log"
}

install_slurm() {  # the package lists of a fresh machine may be absent or old
  export DEBIAN_FRONTEND=noninteractive
  apt-get install -y --no-install-recommends "${slurm_packages[@]}" \
    || { apt-get update && apt-get install -y --no-install-recommends "${slurm_packages[@]}"; }
}

check() {
  "$python" -m ruff check .
  "$python" -m ruff format --check .
  "$python" -m mypy
}

set_up_python
case ${1:-all} in
  all)
    set_up_slurm
    check
    exec "$python" -m pytest "${workers[@]}" --durations=30 "${tiers[@]}"
    ;;
  check)
    check
    ;;
  fast)
    check
    exec "$python" -m pytest -n 2 --dist loadfile tests/unit "${@:2}"
    ;;
  gpu)
    exec "$python" -m pytest -m gpu tests/gpu tests/unit "${@:2}"
    ;;
  unit | process | system | slurm)
    [[ $1 != slurm ]] || set_up_slurm
    exec "$python" -m pytest "tests/$1" "${@:2}"
    ;;
  *)
    exec "$python" -m pytest "$@"
    ;;
esac
