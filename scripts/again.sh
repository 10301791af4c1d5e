#!/bin/sh
# Runs a command, and runs it again where it says that it goes on: see --help.
set -eu

usage() {
    cat <<'END'
usage: [RETRIES=10] sh scripts/again.sh COMMAND [ARGUMENT...]

Runs COMMAND, and runs it again when it ends with
  75  it has saved after SIGTERM, or
  76  another host stopped or was lost,
at most RETRIES times; any other status is final, and is this script's own. SIGTERM to this script,
or Ctrl-C, goes to COMMAND as SIGTERM: it saves, and both end. Training goes on from its newest
checkpoint.

  RETRIES=3 sh scripts/again.sh .venv/bin/python train_meanflow.py --workdir=runs/digits/mean_flow
END
}

case ${1:---help} in
--help | -h)
    usage
    exit 0
    ;;
esac

retries=${RETRIES:-10} wait_before=${WAIT:-5} stopped='' child=''
trap 'stopped=1; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || :' TERM INT

while :; do
    status=0
    "$@" &
    child=$!
    wait "$child" || status=$?
    while kill -0 "$child" 2>/dev/null; do # a signal ends the wait, not the command
        status=0
        wait "$child" || status=$?
    done
    child=''
    case $status in
    75 | 76) ;;
    *) exit "$status" ;;
    esac
    if [ -n "$stopped" ] || [ "$retries" -le 0 ]; then
        exit "$status"
    fi
    echo "again: ended with status $status, starting it again ($retries times at most)" >&2
    retries=$((retries - 1))
    sleep "$wait_before" # the other hosts end meanwhile, and the port is free again
    [ -z "$stopped" ] || exit "$status"
done
