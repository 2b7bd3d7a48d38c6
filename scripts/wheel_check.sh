#!/bin/sh
# Proves that the wheel works without the source tree: builds it, installs it into an empty environment in a
# temporary folder and runs the commands there: bpe-train and bpe-encode with nothing else installed, bpe-inspect
# with numpy alone; only then are the packages of the development environment lent (not downloaded again), for
# `lm-train --help`.
set -eu

cd "$(dirname "$0")/.."
venv=${BYTEKILN_VENV:-.venv}
case $venv in /*) ;; *) venv=$PWD/$venv ;; esac
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

say() { printf 'wheel-check: %s\n' "$*"; }

say "building the wheel"
"$venv/bin/maturin" build --release --quiet --out "$work/dist"
say "installing it into an empty environment"
"$venv/bin/python" -m venv "$work/env"
"$work/env/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "$work"/dist/*.whl

cd "$work"
unset PYTHONPATH
for i in 1 2 3 4 5 6 7 8; do
    printf 'the kiln is warm, the clay is wet; pot number %s goes in.\n<|endoftext|>' "$i"
done >text.txt
env/bin/bpe-train text.txt --vocab-size 300 --special-token "<|endoftext|>" --out tokenizer.json
env/bin/bpe-encode text.txt --tokenizer tokenizer.json --out text.npy
say "bpe-train and bpe-encode work with nothing else installed; now numpy, for bpe-inspect and the Python interface"
rm -rf env
"$venv/bin/python" -m venv env
env/bin/python -m pip install --quiet --disable-pip-version-check numpy
env/bin/python -m pip install --quiet --disable-pip-version-check --no-deps dist/*.whl
env/bin/bpe-inspect tokenizer.json --text text.txt
env/bin/python -c '
import sys, bytekiln
assert bytekiln.__file__.startswith(sys.argv[1]), bytekiln.__file__
t = bytekiln.Tokenizer.from_file("tokenizer.json")
ids = bytekiln.TokenFile.open("text.npy").array.tolist()
assert t.decode(ids) == open("text.txt").read(), "the text does not come back"
' "$work"

site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
lent=$(env/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
printf '%s\n' "$site" >"$lent/lent.pth"
env/bin/lm-train --help >help.txt
grep -q 'lm-train' help.txt
say "passed"
