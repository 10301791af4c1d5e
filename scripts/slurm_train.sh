#!/bin/bash
# Trains on one or several nodes of a SLURM cluster: see --help.
#SBATCH --job-name=flow-train
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -eu

usage() {
    cat <<'END'
usage: sbatch [OPTIONS OF SBATCH] scripts/slurm_train.sh SCRIPT.py [FLAG...]

Runs one task per node, which takes all GPUs of its node; JAX finds the other tasks by SLURM's own
variables. Submit it from the checkout, which all nodes must see, like --workdir.

  sbatch --nodes=4 --gpus-per-node=8 --cpus-per-task=64 --time=24:00:00 \
      scripts/slurm_train.sh train_meanflow.py --config=configs/imagenet256.py:meanflow_xl2 \
      --data_dir data/imagenet256 --mesh.fsdp 8 --workdir=runs/xl2

Without --cpus-per-task a task has one core, which feeds no GPU.

Two minutes before the time limit SLURM sends SIGTERM to the tasks (--signal=TERM@120). They end
their step, or their evaluation and one step, save, and end with status 75; the job goes back into
the queue, to go on where it was. Give --signal=TERM@SECONDS where that takes longer, as for an
evaluation of minutes (--eval_interval): what is not saved by the limit is done again.

A node that fails puts the job back too (--requeue), and so does status 76, another host was lost,
after REQUEUE_AFTER seconds; sooner it is mostly a mistake, which one task tells and the others see
as a lost host. scancel ends the job for good, and any other status is final: look at the log, and
submit the same command again.

  --dry-run   first of all arguments: prints the command of a task and runs nothing

Environment:
  PYTHON          the interpreter; default .venv/bin/python
  REQUEUES        how often the job may go back; default 100
  REQUEUE_AFTER   see above; default 600
END
}

dry=${DRY_RUN:-}
if [ "${1:-}" = --dry-run ]; then
    dry=1
    shift
fi
case ${1:---help} in
--help | -h)
    usage
    exit 0
    ;;
esac

cd "${SLURM_SUBMIT_DIR:-.}" # sbatch runs a copy of this file from elsewhere
# All tasks are heard: the others end by themselves when one stops, after they have said why.
set -- srun --kill-on-bad-exit=0 "${PYTHON:-.venv/bin/python}" "$@"
if [ -n "$dry" ]; then
    echo "$*"
    exit 0
fi
if [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "slurm_train: submit it: sbatch scripts/slurm_train.sh ..., see --help" >&2
    exit 2
fi
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
    export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" # srun no longer takes it from sbatch
fi

# The warning before the time limit goes to the tasks alone; what this script gets is scancel's.
cancelled=''
trap 'cancelled=1' TERM
"$@" &
step=$! status=0
wait "$step" || status=$?
while kill -0 "$step" 2>/dev/null; do # a signal ends the wait, not the step
    status=0
    wait "$step" || status=$?
done
case $status in
75) again=1 ;;
76) [ "$SECONDS" -lt "${REQUEUE_AFTER:-600}" ] || again=1 ;;
esac
if [ -n "${again:-}" ] && [ -z "$cancelled" ]; then
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "${REQUEUES:-100}" ]; then
        echo "slurm_train: not requeued, as it was $SLURM_RESTART_COUNT times: REQUEUES=" >&2
        exit "$status"
    fi
    echo "slurm_train: ended with status $status, back into the queue" >&2
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
