#!/bin/sh
# Looks for what the set-up needs. Everything there: prints the path of the Python to use, exit status 0.
# Otherwise: one line on stderr for each thing that is missing, saying what to install, exit status 1.
# PYTHON=… names the interpreter to use.
set -u

cd "$(dirname "$0")/.." || exit 1
missing=0
lack() {
    printf 'missing: %s\n' "$*" >&2
    missing=1
}
have() { command -v "$1" >/dev/null 2>&1; }

have git || lack "git; Debian and Ubuntu: apt install git; macOS: xcode-select --install"
have make || lack "make; Debian and Ubuntu: apt install make; macOS: xcode-select --install"
have "${CC:-cc}" || lack "a C compiler (${CC:-cc}); Debian and Ubuntu: apt install gcc; macOS: xcode-select --install"

recent='import sys; sys.exit(sys.version_info < (3, 11))'
python=
seen=
for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python}; do
    have "$candidate" || continue
    if "$candidate" -c "$recent" >/dev/null 2>&1; then
        python=$(command -v "$candidate")
        break
    fi
    seen="$seen $("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)"
done
if [ -z "$python" ]; then
    lack "Python 3.11 or newer${seen:+ (found:$seen)}; Debian and Ubuntu: apt install python3 python3-venv;" \
        "or name one with PYTHON=…"
elif ! "$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then
    lack "Python's venv module ($python has none); Debian and Ubuntu: apt install python3-venv"
fi

wanted=$(sed -n 's/^rust-version *= *"\([0-9.]*\)".*/\1/p' Cargo.toml)
if ! have cargo; then
    if [ -x "${HOME:-}/.cargo/bin/cargo" ]; then
        lack "cargo on PATH (it is in ~/.cargo/bin); run: . \"\$HOME/.cargo/env\"   or: PATH=\"\$HOME/.cargo/bin:\$PATH\""
    else
        lack "a Rust toolchain ($wanted or newer): install rustup (the Rust project's installer)," \
            "or with Debian's rustup package: apt install rustup && rustup default stable"
    fi
elif ! found=$(cargo --version 2>/dev/null | sed -n 's/^cargo \([0-9]*\.[0-9]*\).*/\1/p') || [ -z "$found" ]; then
    lack "a working Rust toolchain (cargo does not answer); run: rustup default stable"
elif [ "$((${found%%.*} * 1000 + ${found#*.}))" -lt "$((${wanted%%.*} * 1000 + ${wanted#*.}))" ]; then
    lack "Rust $wanted or newer (found $found); run: rustup update stable"
fi

[ "$missing" -eq 0 ] || exit 1
printf '%s\n' "$python"
