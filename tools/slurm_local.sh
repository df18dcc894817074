#!/usr/bin/env bash
# Runs a real Slurm on this machine: one controller and N nodes (n1, n2, ...), which are slurmd
# processes on loopback. Each node has G GPUs, which are device files like /dev/null. For trying
# launchers/slurm.sbatch without a cluster, and for tests/slurm.
#
#   apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge     # Debian 12
#   tools/slurm_local.sh up DIR [N=2] [G=0]     # as root; all files are in DIR
#   export SLURM_CONF=DIR/slurm.conf            # selects this cluster for sbatch, squeue, scontrol
#   sbatch --partition=urgent ...               # preempts other jobs: SIGTERM, 60 s, then a requeue
#   tools/slurm_local.sh down DIR               # cancels all jobs, ends the processes of `up`
set -euo pipefail

fail() { echo "slurm_local: $*" >&2; exit 1; }
usage() { sed -n '2,10s/^# \?//p' "$0" >&2; exit 2; }
[[ $# -ge 2 ]] || usage
action=$1
mkdir -p "$2"
dir=$(cd "$2" && pwd)
nodes=${3:-2}
gpus=${4:-0}
export SLURM_CONF=$dir/slurm.conf PATH=$PATH:/usr/sbin:/sbin

free_ports() {  # prints the first of nodes + 1 consecutive free ports
  local base=$((20000 + RANDOM % 10000)) port
  for ((port = base; port <= base + nodes; port++)); do
    if (: < "/dev/tcp/127.0.0.1/$port") 2> /dev/null; then
      free_ports
      return
    fi
  done
  echo "$base"
}

start() {  # start NAME COMMAND...: runs it in a new session in the background, records its pid
  local name=$1
  shift
  setsid "$@" < /dev/null >> "$dir/log/$name" 2>&1 &
  echo "$! $1" >> "$dir/pids"
}

configure() {
  local port gres=
  port=$(free_ports)
  mkdir -p "$dir"/{state,spool,log,run}
  chmod 755 "$dir" "$dir/run"
  [[ -s $dir/munge.key ]] || (umask 077; head -c 1024 /dev/urandom > "$dir/munge.key")
  : > "$dir/gres.conf"
  echo 'CgroupAutomount=no' > "$dir/cgroup.conf"
  if ((gpus > 0)); then  # Slurm counts devices by their files and sets CUDA_VISIBLE_DEVICES accordingly
    for ((gpu = 0; gpu < gpus; gpu++)); do [[ -e $dir/gpu$gpu ]] || mknod "$dir/gpu$gpu" c 1 3; done
    echo "NodeName=n[1-$nodes] Name=gpu File=$dir/gpu[0-$((gpus - 1))]" > "$dir/gres.conf"
    gres="Gres=gpu:$gpus"
  fi
  # No cgroups, accounting or MPI. cred_expire: delay of a requeued job (120 s in a real cluster).
  # config_overrides: uses the CPUs given here instead of those of the machine.
  cat > "$SLURM_CONF" << CONF
ClusterName=local
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/run/munge.socket,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobRequeue=1
ReturnToService=2
KillWait=5
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=n[1-$nodes] NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=[$((port + 1))-$((port + nodes))] CPUs=8 RealMemory=1000 $gres
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=local Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
CONF
}

up() {
  local program node
  for program in munged slurmctld slurmd sbatch; do
    command -v "$program" > /dev/null || fail "$program is missing: apt-get install -y \
      --no-install-recommends slurmctld slurmd slurm-client munge"
  done
  [[ $(id -u) == 0 ]] || fail "slurmd needs root"
  [[ ! -s $dir/pids ]] || fail "$dir has a cluster, or remains of one: $0 down $dir"
  configure
  start munged munged --foreground --force --key-file="$dir/munge.key" \
    --socket="$dir/run/munge.socket" --pid-file="$dir/run/munged.pid" \
    --log-file="$dir/log/munged.log" --seed-file="$dir/run/munge.seed"
  start slurmctld slurmctld -D -c -f "$SLURM_CONF"
  for ((node = 1; node <= nodes; node++)); do
    start "slurmd.n$node" slurmd -D -N "n$node" -f "$SLURM_CONF"
  done
  for ((tenth = 0; tenth < 900; tenth++)); do
    [[ $(sinfo -h -N -p local -o %T 2> /dev/null | grep -c idle) != "$nodes" ]] || { sinfo; return; }
    sleep 0.1
  done
  tail -n 5 "$dir"/log/* >&2
  fail "the nodes did not come up within 90 s; above are the ends of $dir/log/*"
}

down() {
  [[ -s $dir/pids ]] || return 0
  timeout 10 squeue -h -o %A 2> /dev/null | sort -u | xargs -r timeout 10 scancel || true
  for ((tenth = 0; tenth < 150; tenth++)); do
    [[ -n $(timeout 10 squeue -h 2> /dev/null) ]] || break
    sleep 0.1
  done
  local pid name
  while read -r pid name; do  # the pid may have been reused
    if tr '\0' ' ' 2> /dev/null < "/proc/$pid/cmdline" | grep -q -- "$dir/"; then
      kill "$pid" 2> /dev/null || true
      for ((tenth = 0; tenth < 100; tenth++)); do
        kill -0 "$pid" 2> /dev/null || break
        sleep 0.1
      done
    fi
  done < <(tac "$dir/pids")
  rm -f "$dir/pids"
}

case $action in
  up) up ;;
  down) down ;;
  *) usage ;;
esac
