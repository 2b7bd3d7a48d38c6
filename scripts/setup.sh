#!/bin/sh
# Makes the virtual environment, installs what is needed and builds the Rust core in release mode.
# Safe to run again: each part leaves a stamp in the environment and is skipped while nothing has changed.
#
#   scripts/setup.sh                 BYTEKILN_VENV=… another folder than .venv, PYTHON=… the interpreter
set -eu

cd "$(dirname "$0")/.."
venv=${BYTEKILN_VENV:-.venv}
stamps=$venv/stamps

python=$(scripts/prerequisites.sh) || exit 1

if ! "$venv/bin/python" -c 'import pip' >/dev/null 2>&1; then
    echo "set-up: making the virtual environment $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
fi
mkdir -p "$stamps"

# A stamp holds the checksum of what its part was made from.
fresh() { [ -f "$stamps/$1" ] && [ "$(cat "$stamps/$1")" = "$2" ]; }
stamp() { printf '%s\n' "$2" >"$stamps/$1.new" && mv "$stamps/$1.new" "$stamps/$1"; }

wanted=$("$venv/bin/python" scripts/requirements.py test dev)
key=$(printf '%s\n' "$wanted" | cksum)
if ! fresh dependencies "$key"; then
    if ! "$venv/bin/python" scripts/requirements.py --have torch; then
        echo "set-up: PyTorch comes with the dependencies. Where the package index has the CUDA build (Linux on"
        echo "set-up: x86-64) that is about 3 GB to download and 5 GB on disk; README.md, \"Without a GPU\", has a way round."
    fi
    echo "set-up: installing dependencies"
    printf '%s\n' "$wanted" >"$stamps/requirements.txt"
    "$venv/bin/python" -m pip install --disable-pip-version-check --requirement "$stamps/requirements.txt"
    stamp dependencies "$key"
fi

key=$(find rust Cargo.toml Cargo.lock pyproject.toml \
    \( -name '*.rs' -o -name 'Cargo.*' -o -name pyproject.toml \) -type f -exec cksum {} + 2>/dev/null | sort | cksum)
if ! fresh core "$key" || ! ls python/bytekiln/_core.*.so >/dev/null 2>&1; then
    echo "set-up: building the Rust core (a minute or two the first time)"
    case $venv in /*) there=$venv ;; *) there=$PWD/$venv ;; esac
    PIP_QUIET=1 VIRTUAL_ENV=$there "$venv/bin/maturin" develop --release --quiet
    stamp core "$key"
fi
