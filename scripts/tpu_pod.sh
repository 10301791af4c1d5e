#!/bin/sh
# Creates a TPU pod slice, installs this checkout on its hosts, and runs commands on all: see --help.
set -eu

usage() {
    cat <<'END'
usage: NAME=... ZONE=... [TYPE=...] sh scripts/tpu_pod.sh [--dry-run] COMMAND [ARGUMENT...]

  create              the slice, of TYPE; with QUEUED=1 as a queued resource
  install             what git has of this checkout, and its packages, on all hosts
  train SCRIPT [FLAG...]   starts a training script on all hosts; it outlives this connection
  eval [FLAG...]      starts eval_fid.py on all hosts, as one program
  log [N]             follows the log of host N (default 0, which is the one that tells)
  stop                SIGTERM: training saves and ends, on all hosts
  ssh [N]             a shell on host N
  delete              the slice and what is on its disks

  export NAME=pod ZONE=us-east5-b TYPE=v6e-16
  sh scripts/tpu_pod.sh create
  sh scripts/tpu_pod.sh install
  sh scripts/tpu_pod.sh train train_meanflow.py --config=configs/imagenet256.py:meanflow_xl2 \
      --data_dir /mnt/data/imagenet256 --mesh.fsdp 4 --workdir=gs://bucket/runs/xl2
  sh scripts/tpu_pod.sh eval --workdir=gs://bucket/runs/xl2 --steps=1,2,4 --out=/mnt/data/eval
  sh scripts/tpu_pod.sh log

The hosts find each other by themselves. --workdir must lie where all of them see it, in a bucket or
in a file system that is mounted on all; --out and the data must lie in such a file system. One
command runs at a time. One that was cut off is started again by itself (scripts/again.sh), and goes
on from its newest checkpoint; so it does on a new slice.

  --dry-run   prints the commands and runs nothing

Environment:
  NAME ZONE   of the slice
  PROJECT     if not gcloud's own
  TYPE        as v4-32, v5litepod-64, v5p-32 or v6e-16
  VERSION     of the hosts' software; by default what fits TYPE
  SPOT=1      cheaper, and taken away at any time
  QUEUED=1    waits in Google's queue; for create and delete
END
}

fail() {
    echo "tpu_pod: $*" >&2
    exit 2
}

dry=${DRY_RUN:-}
if [ "${1:-}" = --dry-run ]; then
    dry=1
    shift
fi
command=${1:---help}
[ $# = 0 ] || shift
case $command in
--help | -h)
    usage
    exit 0
    ;;
esac
[ -n "${NAME:-}" ] || fail "NAME= of the slice is missing, see --help"
[ -n "${ZONE:-}" ] || fail "ZONE= of the slice is missing, see --help"
cd "$(dirname "$0")/.."

# gcloud GROUP VERB NAME ARGUMENT...
tpu() {
    group=$1 verb=$2
    shift 2
    run gcloud compute tpus "$group" "$verb" "$@" --zone="$ZONE" ${PROJECT:+"--project=$PROJECT"}
}

run() {
    if [ -n "$dry" ]; then
        printf '%s' "$1"
        shift
        for word; do printf ' %s' "$(quoted "$word")"; done
        echo
    else
        "$@"
    fi
}

# One word, so that a shell reads it as it is.
quoted() {
    case $1 in
    *[!A-Za-z0-9_./:=,@%+-]* | '') printf "'%s'" "$(printf '%s' "$1" | sed "s/'/'\\\\''/g")" ;;
    *) printf '%s' "$1" ;;
    esac
}

everywhere() {
    tpu tpu-vm ssh "$NAME" --worker=all --command="$1"
}

# Of the hosts' software, as Google's page on TPU software versions has it.
version() {
    case $TYPE in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) echo tpu-ubuntu2204-base ;;
    esac
}

create() {
    [ -n "${TYPE:-}" ] || fail "TYPE= of the slice is missing, v6e-16 say"
    set -- "--accelerator-type=$TYPE" ${SPOT:+--spot}
    if [ -n "${QUEUED:-}" ]; then
        tpu queued-resources create "$NAME" "--node-id=$NAME" \
            "--runtime-version=${VERSION:-$(version)}" "$@"
    else
        tpu tpu-vm create "$NAME" "--version=${VERSION:-$(version)}" "$@"
    fi
}

# The hosts' own Python is 3.10; uv brings one that fits.
install() {
    archive=$(mktemp -t flow.XXXXXX)
    trap 'rm -f "$archive"' EXIT
    run git archive --format=tar.gz --output="$archive" HEAD
    tpu tpu-vm scp "$archive" "$NAME:flow.tar.gz" --worker=all
    # shellcheck disable=SC2016 # the hosts' shells expand it
    everywhere 'set -e
mkdir -p flow
tar xzf flow.tar.gz -C flow
cd flow
command -v make >/dev/null || sudo apt-get install -y -q make
python3 -m pip install --quiet --user uv
PATH=$HOME/.local/bin:$PATH
uv python install --quiet 3.12
make setup EXTRAS=tpu,gcs PYTHON="$(uv python find 3.12)"'
}

# The words given, on all hosts, in the background.
launch() {
    words=''
    for word; do [ "$word" != --dry-run ] || fail "--dry-run comes first: tpu_pod.sh --dry-run ..."; done
    for word; do words="$words $(quoted "$word")"; done
    # shellcheck disable=SC2016 # the hosts' shells expand it
    alone='if grep -aqs again.sh "/proc/$(cat flow.pid 2>/dev/null)/cmdline"; then echo "tpu_pod: a command runs on this host: stop it first" >&2; exit 2; fi'
    everywhere "cd flow && { $alone; nohup sh scripts/again.sh .venv/bin/python$words >>flow.log 2>&1 </dev/null & echo \$! >flow.pid; }"
}

case $command in
create) create ;;
install) install ;;
train)
    case ${1:-} in
    train_*.py) launch "$@" ;;
    *) fail "train what? train_flow.py or train_meanflow.py, then its flags" ;;
    esac
    ;;
eval) launch eval_fid.py "$@" ;;
log) tpu tpu-vm ssh "$NAME" "--worker=${1:-0}" --command="tail -n 50 -f flow/flow.log" ;;
stop) everywhere "kill -TERM \$(cat flow/flow.pid)" ;;
ssh) tpu tpu-vm ssh "$NAME" "--worker=${1:-0}" ;;
delete)
    if [ -n "${QUEUED:-}" ]; then
        tpu queued-resources delete "$NAME" --force --quiet
    else
        tpu tpu-vm delete "$NAME" --quiet
    fi
    ;;
*) fail "no command $command: see --help" ;;
esac
