#!/bin/sh
# Makes .venv with the packages of requirements.txt. `make` calls it when there is no .venv, when an
# install was interrupted, and when the pins have changed.
set -eu
cd "$(dirname "$0")/.."

if [ $# -gt 0 ]; then
    echo "usage: [PYTHON=python3.12] sh scripts/setup.sh   # makes .venv, 1.5 GB; \`make\` calls it"
    [ "$1" = --help ] || [ "$1" = -h ] || exit 2
    exit 0
fi

fail() {
    echo "setup: $*" >&2
    exit 1
}

# Running it is the only sure test: pyenv's shims, for one, exist for versions that do not run.
# The pins have wheels for Python 3.11 to 3.14.
usable() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' >/dev/null 2>&1
}

# Debian's Python has no ensurepip unless python3-venv is installed; uv needs none.
makes_venv() {
    command -v uv >/dev/null || "$1" -c 'import ensurepip, venv' >/dev/null 2>&1
}

if [ -n "${PYTHON:-}" ] && ! usable "$PYTHON"; then
    echo "setup: PYTHON=$PYTHON is not a Python 3.11 to 3.14 that runs; looking for another" >&2
fi
python='' without_venv=''
for name in ${PYTHON:+"$PYTHON"} python3.12 python3.11 python3.13 python3.14 python3; do
    usable "$name" || continue
    if makes_venv "$name"; then
        python=$name
        break
    fi
    without_venv=${without_venv:-$name}
done
if [ -z "$python" ] && [ -n "$without_venv" ]; then
    fail "$without_venv cannot make virtual environments; on Debian: apt install python3-venv"
elif [ -z "$python" ]; then
    fail "no Python 3.11 to 3.14 found; install one, or name it: make PYTHON=/path/to/python ..."
fi

if [ -d .venv ] && [ ! -e .venv/complete ] && [ ! -e .venv/unfinished ]; then
    fail ".venv was not made by this script: move it away, then run make again"
fi
echo "setup: installing the pinned packages into .venv ($("$python" --version), 1.5 GB)" >&2
rm -rf .venv
mkdir .venv
touch .venv/unfinished # tells this folder from one made by hand
if command -v uv >/dev/null; then
    # --seed: with pip, as the other way has it
    uv venv --quiet --seed --allow-existing --python "$python" .venv
    uv pip install --quiet --python .venv/bin/python -r requirements.txt
else
    "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
fi
rm .venv/unfinished
touch .venv/complete # last: without it the next `make` starts over
