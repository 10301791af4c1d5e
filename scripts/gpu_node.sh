#!/bin/sh
# Runs a command on one node with several GPUs: see --help.
set -eu

usage() {
    cat <<'END'
usage: sh scripts/gpu_node.sh [--dry-run] SCRIPT.py [FLAG...]

Trains or evaluates on all GPUs of this machine, in one process: JAX sees them all, and the mesh
takes them (--mesh.data, --mesh.fsdp). Started again when it has saved after SIGTERM or was cut
off, at most RETRIES times (see scripts/again.sh).

  sh scripts/gpu_node.sh train_meanflow.py --config=configs/imagenet256.py:meanflow_b4 \
      --data_dir data/imagenet256 --workdir=runs/b4
  CUDA_VISIBLE_DEVICES=0,1 sh scripts/gpu_node.sh eval_fid.py --workdir=runs/b4 --out=runs/eval

  --dry-run   prints the command and runs nothing

Environment:
  PYTHON      the interpreter; default .venv/bin/python
  RETRIES     default 10
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

cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
set -- sh scripts/again.sh "$python" "$@" --distributed=off
if [ -n "$dry" ]; then
    echo "$*"
    exit 0
fi
if ! command -v "$python" >/dev/null; then
    echo "gpu_node: no $python: run make setup EXTRAS=cuda, or name one with PYTHON=" >&2
    exit 2
fi
check='
import importlib.util as u, sys
sys.exit(not any(u.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)))'
if ! "$python" -c "$check"; then
    echo "gpu_node: $python has no CUDA for JAX: run make setup EXTRAS=cuda" >&2
    exit 2
fi
exec "$@"
