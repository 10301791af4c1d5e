#!/bin/bash
# Measures runs by an array of SLURM jobs: see --help.
#SBATCH --job-name=flow-fid
#SBATCH --ntasks=1
#SBATCH --signal=TERM@30
#SBATCH --requeue
#SBATCH --open-mode=append
set -eu

usage() {
    cat <<'END'
usage: sbatch --array=0-N [OPTIONS OF SBATCH] scripts/slurm_fid.sh --out=FOLDER [FLAG...]

Runs eval_fid.py with the same flags in each job of the array. They share --out: each takes cells
that nobody has, and the table is written again with every cell. N is as you like; more jobs than
cells find nothing to do. Submit it from the checkout, which all nodes must see, like --out.

  sbatch --array=0-7 --gpus-per-node=1 --time=8:00:00 scripts/slurm_fid.sh --out=runs/eval \
      --workdir=runs/b4 --workdir=runs/xl2 --steps=1,2,4,8,16,32 --num_samples=50000

At its time limit a job goes back into the queue, and on with what it had begun. scancel ends it for
good.

  --dry-run   first of all arguments: prints the command and runs nothing

Environment:
  PYTHON      the interpreter; default .venv/bin/python
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
case " $*" in
*" --out"*) ;;
*)
    echo "slurm_fid: give --out=FOLDER, which the jobs of the array share" >&2
    exit 2
    ;;
esac

cd "${SLURM_SUBMIT_DIR:-.}" # sbatch runs a copy of this file from elsewhere
set -- srun "${PYTHON:-.venv/bin/python}" eval_fid.py "$@" --distributed=off
if [ -n "$dry" ]; then
    echo "$*"
    exit 0
fi
if [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "slurm_fid: submit it: sbatch --array=0-7 scripts/slurm_fid.sh ..., see --help" >&2
    exit 2
fi

# The warning before the time limit goes to the task alone; what this script gets is scancel's.
cancelled=''
trap 'cancelled=1' TERM
"$@" &
step=$! status=0
wait "$step" || status=$?
while kill -0 "$step" 2>/dev/null; do # a signal ends the wait, not the step
    status=0
    wait "$step" || status=$?
done
if [ "$status" = 143 ] && [ -z "$cancelled" ]; then # ended by SIGTERM
    job=$SLURM_JOB_ID
    if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then
        job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    fi
    echo "slurm_fid: the time is over, back into the queue" >&2
    scontrol requeue "$job"
fi
exit "$status"
