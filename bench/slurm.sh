#!/usr/bin/env bash
# A real SLURM on one machine, and what runs must survive on it: as root on Debian or Ubuntu,
#
#     bench/slurm.sh            # prints a log; exit status 0 where every case was right
#     bench/slurm.sh node array # these cases alone, of: whole, signal, cancel, node, array
#     bench/slurm.sh --stop     # end the cluster that it has started
#
# It installs slurm-wlm and munge, starts a controller and two nodes (n1 and n2, on the loopback address), and submits the
# built-in world to them, on two nodes with one process each: a run to its end, a signal before the time limit with
# requeue, scancel, a node that dies, and an array of a study's runs. About ten minutes on two cores. It writes
# /etc/slurm/slurm.conf and a line in /etc/hosts, and deletes checkpoints/slurm-*; a machine that has a SLURM of its own
# is left alone.
set -uo pipefail
place=${SLURM_PLACE:-/tmp/maskvlm-slurm}
cd "$(dirname "$0")/.."
python=${PYTHON:-$PWD/.venv/bin/python}
export PYTHONPATH=src OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE

mark='# written by bench/slurm.sh'
if [ -e /etc/slurm/slurm.conf ] && ! grep -q "^$mark" /etc/slurm/slurm.conf; then
    echo "error: /etc/slurm/slurm.conf: this machine has a SLURM of its own. Take another one." >&2; exit 73
fi
stop() {
    scontrol shutdown 2>/dev/null
    pkill -x slurmd; pkill -x slurmctld; pkill -x munged
    sed -i '/ n1 n2$/d' /etc/hosts 2>/dev/null || true
}
if [ "${1:-}" = --stop ]; then stop; exit 0; fi

start() {
    command -v slurmctld slurmd munged >/dev/null || {
        apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge
    } >/dev/null || { echo "error: slurm-wlm and munge could not be installed" >&2; exit 69; }
    mkdir -p "$place/state" /run/munge
    [ -f /etc/munge/munge.key ] || dd if=/dev/urandom bs=1024 count=1 of=/etc/munge/munge.key 2>/dev/null
    chown -R munge: /etc/munge /run/munge /var/log/munge /var/lib/munge && chmod 400 /etc/munge/munge.key
    pgrep -x munged >/dev/null || runuser -u munge -- munged --force
    grep -q ' n1 n2$' /etc/hosts || echo '127.0.0.1 n1 n2' >>/etc/hosts
    host=$(hostname -s)
    cat >/etc/slurm/slurm.conf <<END
$mark
ClusterName=loopback
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
StateSaveLocation=$place/state
SlurmctldLogFile=$place/slurmctld.log
SlurmdLogFile=$place/slurmd-%n.log
SlurmctldPidFile=$place/slurmctld.pid
SlurmdPidFile=$place/slurmd-%n.pid
SlurmdSpoolDir=$place/spool-%n
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
KillWait=10
SlurmdTimeout=30
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=17001 CPUs=8 RealMemory=8000 State=UNKNOWN
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=17002 CPUs=8 RealMemory=8000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
    pgrep -x slurmctld >/dev/null || slurmctld -c
    sleep 3
    pgrep -f 'slurmd -N n1' >/dev/null || slurmd -N n1
    pgrep -f 'slurmd -N n2' >/dev/null || slurmd -N n2
    for _ in $(seq 30); do [ "$(sinfo -h -o %T | sort -u)" = idle ] && return; sleep 1; done
    echo "error: the two nodes are not up" >&2; sinfo >&2; exit 69
}

failures=0
tell() { printf '%s\n' "- $*"; }
right() { # what, and a command that must succeed
    local what=$1; shift
    if "$@" >/dev/null 2>&1; then tell "$what: right"; else tell "$what: **wrong** ($*)"; failures=$((failures + 1)); fi
}
small=(--trainer.accelerator cpu --trainer.devices 1 --trainer.num_nodes 2 --data.workers 0 --data.eval_batch_size 100)
submit() { # run, steps, more options; prints the job's number
    local run=$1 steps=$2; shift 2
    "$python" -m maskvlm submit model=tiny data=scenes "run=$run" where=slurm4x8 "${small[@]}" --data.steps "$steps" "$@" |
        grep -o 'batch job [0-9]*' | grep -o '[0-9]*'
}
state() { scontrol show job "$1" 2>/dev/null | grep -o 'JobState=[A-Z_]*' | cut -d= -f2; }
wait_for() { # seconds, and a command that must come to succeed
    local most=$1; shift
    for _ in $(seq "$most"); do "$@" >/dev/null 2>&1 && return 0; sleep 1; done
    return 1
}
is() { [ "$(state "$1")" = "$2" ]; }
over() { [ -z "$(squeue -h -j "$1" 2>/dev/null)" ]; }
out() { cat "checkpoints/$1"/slurm-*.out; }
says() { out "$1" | grep -q "$2"; }
step_of() { "$python" -c "import json; print(json.load(open('checkpoints/$1/metrics.json'))['step'])"; }

wanted() { [ -z "$cases" ] || [[ " $cases " == *" $1 "* ]]; }
cases="$*"

start
export SBATCH_TIMELIMIT=60
echo "## $(slurmctld -V), $(getconf _NPROCESSORS_ONLN) cores, commit $(git rev-parse --short HEAD)"
rm -rf checkpoints/slurm-*

if wanted whole; then
echo; echo "### A run on two nodes"
job=$(submit slurm-whole 60)
right "job $job comes to its end" wait_for 400 is "$job" COMPLETED
right "two processes, the numbers of the last step" grep -q '"processes": 2' checkpoints/slurm-whole/versions.json
right "metrics of step 60" test "$(step_of slurm-whole)" = 60
fi

if wanted signal; then
echo; echo "### The signal before the time limit"
job=$(submit slurm-requeue 300 --trainer.val_check_interval 1.0)
right "it trains" wait_for 400 says slurm-requeue 'step 10/300'
scancel --signal=USR1 "$job" # to the processes, as `--signal=USR1@120` does
right "it saves and is queued again" wait_for 90 says slurm-requeue "job $job is queued again"
right "it goes on from its checkpoint" wait_for 300 says slurm-requeue 'resuming after step'
right "job $job comes to its end" wait_for 400 is "$job" COMPLETED
right "metrics of step 300" test "$(step_of slurm-requeue)" = 300
fi

if wanted cancel; then
echo; echo "### scancel"
job=$(submit slurm-cancel 3000)
right "it trains" wait_for 400 says slurm-cancel 'step 10/3000'
scancel "$job"
right "job $job ends within KillWait" wait_for 40 is "$job" CANCELLED
right "its checkpoint is whole" "$python" -c "from pathlib import Path; from maskvlm.checkpoint.integrity import newest_valid
assert newest_valid(Path('checkpoints/slurm-cancel'))"
fi

if wanted node; then
echo; echo "### A node dies"
job=$(submit slurm-node 120)
right "it trains, and has a checkpoint" wait_for 400 says slurm-node 'step 30: '
kill -KILL "$(pgrep -f 'slurmd -N n2' | head -1)"
for process in $(grep -l 'SLURMD_NODENAME=n2' /proc/[0-9]*/environ 2>/dev/null | cut -d/ -f3); do kill -KILL "$process" 2>/dev/null; done
right "the other process does not wait for ever" wait_for 200 bash -c "[ \"\$(squeue -h -j $job -o %T)\" != RUNNING ]"
slurmd -N n2
wait_for 120 bash -c "scontrol show job $job | grep -Eq 'JobState=(PENDING|FAILED|NODE_FAIL|CANCELLED)'"
tell "SLURM then says of job $job: $(state "$job")"
[ -n "$(squeue -h -j "$job" 2>/dev/null)" ] || { job=$(submit slurm-node 120); tell "submitted again: job $job"; }
right "it goes on from its checkpoint" wait_for 300 says slurm-node 'resuming after step'
right "job $job comes to its end" wait_for 400 is "$job" COMPLETED
right "metrics of step 120" test "$(step_of slurm-node)" = 120
fi

if wanted array; then
echo; echo "### An array of a study's runs"
mkdir -p checkpoints/slurm-study
cat >checkpoints/slurm-study/study.yaml <<END
name: slurm-array
title: An array
run: pretrain model=tiny data=scenes
options: {data.steps: 30, data.workers: 0, trainer.accelerator: cpu, trainer.devices: 1, data.eval_batch_size: 100}
seeds: 2
arms:
  all: {label: all losses}
  matching: {label: contrast and matching, options: {model.task.weight_mlm: 0, model.task.weight_mim: 0, model.task.weight_spread: 0}}
metrics: {R@1: {mean: [retrieval/tr_r1]}}
questions: []
END
rm -rf checkpoints/slurm-array
said=$("$python" -m maskvlm study checkpoints/slurm-study/study.yaml --submit --jobs 2 2>&1)
job=$(grep -o 'batch job [0-9]*' <<<"$said" | grep -o '[0-9]*')
right "four tasks are submitted" test -n "$job"
right "all of them end" wait_for 600 over "$job"
right "every run has its metrics" test "$(ls checkpoints/slurm-array/*/metrics.json 2>/dev/null | wc -l)" = 4
right "the page is made of them" "$python" -m maskvlm study checkpoints/slurm-study/study.yaml --page-only
fi

echo; echo "$failures of the checks were wrong"
exit $((failures > 0))
