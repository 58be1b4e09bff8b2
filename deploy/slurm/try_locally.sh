#!/bin/bash
# Runs learner.sbatch and actors.sbatch for real, under a Slurm of one machine, on CPUs: the demo, shortened.
#
#   sudo apt-get install slurmctld slurmd slurm-client munge
#   sudo deploy/slurm/try_locally.sh [FOLDER]
#
# As root, because slurmd is. Everything that it writes is in FOLDER (default: a new one under /tmp); ports are free
# ones; the daemons are its own and end with it. It took 3.5 and 5 minutes on two cores.
set -euo pipefail

project=$(cd "$(dirname "$0")/../.." && pwd)
folder=$(mkdir -p "${1:-/tmp}" && cd "${1:-$(mktemp -d /tmp/slurm-XXXXXX)}" && pwd)
bin=${VENV:-$project/.venv}/bin
run=$folder/runs/demo
keys=${KEYS:-}
pids=()

main() {
    check_needs
    start_daemons
    cd "$folder"
    local learner first second
    learner=$(submit --cpus-per-task=1 "$project/deploy/slurm/learner.sbatch" "$run" demo \
        learner.steps=100 algorithm.critic_warmup_steps=8 eval.every=0 eval.num_prompts=16 checkpoint.every=2 \
        actors.start_timeout_s=1200)
    first=$(submit --array=0-1 "$project/deploy/slurm/actors.sbatch" "$run")
    say "learner: job $learner; two actors: jobs ${first}_0 and ${first}_1"
    wait_for 1500 trained_by "actor-$first-0"
    wait_for 1500 trained_by "actor-$first-1"
    say "step $(steps): both actors have sampled groups that were trained"

    second=$(submit "$project/deploy/slurm/actors.sbatch" "$run")
    wait_for 1500 trained_by "actor-$second-0"
    say "step $(steps): so has the actor of job $second, added now"

    scancel "${first}_0"
    wait_for 60 is_gone "${first}_0"
    wait_for 10 grep -q "actor-$first-0 says bye" "$folder/learner-$learner.log"
    local before
    before=$(steps)
    wait_for 300 steps_above "$before"
    say "job ${first}_0 is cancelled, its actor has said bye; step $(steps): the others go on"

    scancel --signal=USR1 --batch "$learner"
    wait_for 120 is_pending "$learner"
    before=$(steps)
    say "step $before: the learner's time is up; it was asked to stop and is queued again"
    wait_for 10 grep -q "waits for its learner" "$folder/actor-$second.log"
    wait_for 1500 steps_above "$before"
    say "step $(steps): it goes on, and so do the actors"

    wait_for 1800 is_gone "$learner" "$first" "$second"
    "$bin/python" "$project/run.py" inspect "$run"
    say "the queue is empty: learner and actors have left by themselves"
}

check_needs() {
    [[ $(id -u) == 0 ]] || fail "slurmd needs root: run this with sudo"
    local name
    for name in munged mungekey slurmctld slurmd sbatch; do
        command -v "$name" >/dev/null || fail "there is no $name: apt-get install slurmctld slurmd slurm-client munge"
    done
    [[ -x $bin/torchrun ]] || fail "there is no $bin/torchrun: run make demo once, or name another environment in VENV"
}

start_daemons() {
    mkdir -p "$folder"/{state,spool,munge,runs}
    chmod 755 "$folder" "$folder/munge"
    mungekey --create --force --keyfile="$folder/munge/key"
    local ctld_port slurmd_port host
    read -r ctld_port slurmd_port < <("$bin/python" - <<'PORTS'
import socket
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
print(*(s.getsockname()[1] for s in sockets))
PORTS
    )
    host=$(hostname -s)
    # More cores than there are: the jobs share the real ones.
    cat >"$folder/slurm.conf" <<CONF
ClusterName=trial
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmctldPort=$ctld_port
SlurmdPort=$slurmd_port
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket,cred_expire=10
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/builtin
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
KillWait=30
SlurmdParameters=config_overrides
NodeName=$host NodeAddr=127.0.0.1 CPUs=8 State=UNKNOWN
PartitionName=all Nodes=$host Default=YES MaxTime=60 State=UP
CONF
    trap stop_daemons EXIT
    export SLURM_CONF=$folder/slurm.conf
    export PATH=$bin:$PATH OMP_NUM_THREADS=1 KEYS=$keys
    start munged --foreground --force --socket="$folder/munge/socket" --key-file="$folder/munge/key" \
        --pid-file="$folder/munge/pid" --log-file="$folder/munge/log" --seed-file="$folder/munge/seed"
    wait_for 10 test -S "$folder/munge/socket"
    start slurmctld -D -f "$SLURM_CONF"
    start slurmd -D -f "$SLURM_CONF"
    wait_for 60 is_idle
    say "Slurm $(sinfo --version | cut -d' ' -f2) is up; its files are in $folder"
}

start() {
    "$@" >"$folder/$1.out" 2>&1 &
    pids+=($!)
}

# In reverse, each waited for; jobs first, so that no task outlives its slurmd.
stop_daemons() {
    if scontrol ping >/dev/null 2>&1; then
        scancel --user=root --full || true
        wait_for 60 queue_is_empty || true
    fi
    local index
    for ((index = ${#pids[@]} - 1; index >= 0; index--)); do
        kill "${pids[index]}" 2>/dev/null && wait "${pids[index]}" || true
    done
}

submit() {
    sbatch --parsable --chdir="$project" --output="$folder/%x-%j.log" "$@"
}

wait_for() {
    local deadline=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        ((SECONDS < deadline)) || fail "waited in vain for: $*"
        sleep 1
    done
}

is_idle() { [[ $(sinfo --noheader --format=%T) == idle ]]; }
queue_is_empty() { [[ -z $(squeue --noheader) ]]; }
is_gone() { [[ -z $(squeue --noheader --jobs="$(IFS=,; echo "$*")" 2>/dev/null) ]]; }
is_pending() { [[ $(squeue --noheader --format=%T --jobs="$1") == PENDING ]]; }
trained_by() { grep -q "\"$1\"" "$run/ledger.jsonl"; }
steps() { grep -c time/step_s "$run/metrics.jsonl"; }
steps_above() { (($(steps) > $1)); }
say() { echo "$(date +%T) $*"; }
fail() {
    echo "error: $*" >&2
    exit 1
}

main
