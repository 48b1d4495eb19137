#!/usr/bin/env bash
# Start SLURM on this machine: munge, controller and one node with four CPUs, all on loopback and
# below one directory, as the calling user. Needs Debian's packages slurm-wlm and munge.
#
#   tests/slurm/start.sh DIRECTORY      start; then: export SLURM_CONF=DIRECTORY/slurm.conf
#   tests/slurm/start.sh --stop DIRECTORY
set -euo pipefail

stop() {
  local file
  for file in "$1"/slurmd.pid "$1"/slurmctld.pid "$1"/munged.pid; do
    [[ ! -f $file ]] || kill "$(cat "$file")" 2>/dev/null || true
  done
}

free_port() {
  python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

if [[ ${1:-} == --stop ]]; then
  stop "$2"
  exit 0
fi
root=$(mkdir -p "$1" && cd "$1" && pwd)
for program in munged slurmctld slurmd sbatch; do
  command -v "$program" >/dev/null || { echo "$program is not installed (apt-get install slurm-wlm munge)" >&2; exit 1; }
done
trap 'code=$?; ((code == 0)) || { stop "$root"; tail -n 20 "$root"/*.log >&2; }' EXIT

mkdir -p "$root"/{state,spool}
chmod 755 "$root"
(umask 077 && head -c 1024 /dev/urandom > "$root/munge.key")
# --force: the socket is for one user, not for the machine
munged --force --key-file="$root/munge.key" --socket="$root/munge.socket" --pid-file="$root/munged.pid" \
  --log-file="$root/munged.log" --seed-file="$root/munge.seed"

host=$(hostname -s)
cat > "$root/slurm.conf" <<CONF
ClusterName=loopback
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$root/munge.socket
CredType=cred/munge
StateSaveLocation=$root/state
SlurmdSpoolDir=$root/spool
SlurmctldPidFile=$root/slurmctld.pid
SlurmdPidFile=$root/slurmd.pid
SlurmctldLogFile=$root/slurmctld.log
SlurmdLogFile=$root/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=2
SchedulerType=sched/builtin
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait=60
MinJobAge=3600
JobRequeue=1
# more CPUs than the machine may have: the tests do not keep them busy
SlurmdParameters=config_overrides
NodeName=$host NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=all Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF=$root/slurm.conf
slurmctld -c
slurmd -c
for _ in $(seq 100); do
  [[ $(sinfo --noheader --format=%T 2>/dev/null) == idle ]] && exit 0
  sleep 0.2
done
echo "the node did not become idle" >&2
exit 1
