#!/usr/bin/env bash
# Builds the two Python environments, in parallel and once per version of their lists in tools/env/:
# the trainer's (with controller and tests) and the engine's (SGLang on a CPU). They are separate
# because SGLang and Megatron-Core pin different packages.
#
#   eval "$(bash tools/setup_env.sh)"
#   export MEGATRON_ASYNC_RL_PYTHON MEGATRON_ASYNC_RL_ENGINE_PYTHON
#
# Prints these two assignments to stdout and progress to stderr. A finished environment is used at
# once; of two runs at a time the second waits for the first. A torch without CUDA is enough and much
# smaller: point pip at such a build where there is one.
set -euo pipefail

lists=$(cd "$(dirname "$0")/env" && pwd)
cache=${MEGATRON_ASYNC_RL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/megatron_async_rl}

say() { echo "setup_env: $*" >&2; }
fail() { say "$*"; exit 1; }

find_python() {  # prints the first Python 3.11 on PATH that can make a virtual environment
  local candidate
  for candidate in python3.11 python3; do
    if "$candidate" -c 'import sys, ensurepip, venv; assert sys.version_info[:2] == (3, 11)' 2> /dev/null; then
      "$candidate" -c 'import sys; print(sys.executable)'
      return
    fi
  done
  return 1
}

step() {  # step LOG NAME COMMAND...: runs it and reports its time, every 5 s and at the end
  local log=$1 name=$2 start=$SECONDS next=$((SECONDS + 5)) pid
  shift 2
  "$@" >> "$log" 2>&1 &
  pid=$!
  while kill -0 "$pid" 2> /dev/null; do
    sleep 0.2
    if ((SECONDS >= next)); then
      say "$name: $((SECONDS - start)) s so far"
      next=$((SECONDS + 5))
    fi
  done
  if ! wait "$pid"; then
    tail -n 15 "$log" >&2
    fail "$name failed; above is the end of $log. Fix the cause (network, disk space) and run again."
  fi
  say "$name: $((SECONDS - start)) s"
}

build() {  # build NAME DIR: needs the lock
  local name=$1 dir=$2 log=$2.log
  rm -rf "$dir"  # an interrupted build
  : > "$log"
  step "$log" "$name: virtual environment" "$python" -m venv "$dir"
  step "$log" "$name: torch" "$dir/bin/python" -m pip install "$(grep '^torch==' "$lists/$name.txt")"
  step "$log" "$name: packages" "$dir/bin/python" -m pip install --no-deps -r "$lists/$name.txt"
  touch "$dir/.complete"
}

ensure() {  # ensure NAME DIR: builds it unless it exists
  [[ -e $2/.complete ]] && return
  (
    flock -n 9 || { say "$1: waiting for another run that builds it"; flock 9; }
    [[ -e $2/.complete ]] || build "$1" "$2"
  ) 9> "$2.lock"
}

python=$(find_python) || fail "needs Python 3.11 with venv. On Debian 12: apt-get install python3.11 python3.11-venv"
mkdir -p "$cache"
version=$("$python" -c 'import platform; print(platform.python_version())')
environment_dir() {  # environment_dir NAME
  echo "$cache/$1-$({ cat "$lists/$1.txt"; echo "$version"; } | sha256sum | cut -c1-12)"
}
trainer=$(environment_dir trainer)
engine=$(environment_dir engine)

ensure trainer "$trainer" &
building=$!
engine_ok=0
ensure engine "$engine" || engine_ok=$?
wait "$building" && [[ $engine_ok == 0 ]] || exit 1

printf 'MEGATRON_ASYNC_RL_PYTHON=%q\n' "$trainer/bin/python"
printf 'MEGATRON_ASYNC_RL_ENGINE_PYTHON=%q\n' "$engine/bin/python"
