#!/usr/bin/env bash
# Makes .venv ready: the pinned packages of requirements.lock and the project itself, its C++ core compiled.
# Idempotent; `make` calls it when one of its inputs is newer than .venv/.ready.
set -euo pipefail
cd "$(dirname "$0")/../.."

fail() { echo "set-up: $*" >&2; exit 1; }

python=${PYTHON:-python3}
command -v "$python" >/dev/null || fail "no '$python' found; install Python 3.11 or newer, or set PYTHON=/path/to/python"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$python" --version 2>&1) is too old; Python 3.11 or newer is needed (set PYTHON=/path/to/python)"
compiler=${CXX:-c++}
command -v "$compiler" >/dev/null || fail "no C++ compiler '$compiler' found; install one (g++ 12 or clang 15 and newer) or set CXX"
printf 'int main() {}\n' | "$compiler" -std=c++20 -x c++ - -o /dev/null 2>/dev/null ||
    fail "'$compiler' does not compile C++20; install g++ 12 or clang 15 or newer, or set CXX"
"$python" -c 'import venv, ensurepip' 2>/dev/null ||
    fail "this Python lacks venv; install it (on Debian: apt-get install python3-venv)"

lock_hash=$("$python" -c 'import hashlib, sys; print(hashlib.sha256(open("requirements.lock", "rb").read()).hexdigest())')
links=()
[ -z "${PIP_FIND_LINKS:-}" ] || links=(--find-links "$PIP_FIND_LINKS")

if [ ! -x .venv/bin/python ] || ! .venv/bin/python -c '' 2>/dev/null; then
    rm -rf .venv
    "$python" -m venv .venv
fi
if [ "$(cat .venv/.lock-hash 2>/dev/null)" != "$lock_hash" ]; then
    echo "set-up: installing the packages of requirements.lock into .venv" >&2
    .venv/bin/python -m pip install --quiet --disable-pip-version-check uv==0.13.8 2>/dev/null ||
        fail "pip could not install uv==0.13.8; is the package index reachable?"
    # Bytecode now: where Python may not write it later, every process of every stage would compile torch anew.
    .venv/bin/uv pip install --quiet --compile-bytecode --python .venv/bin/python "${links[@]}" -r requirements.lock ||
        fail "the packages of requirements.lock could not be installed; the lines above say which"
    echo "$lock_hash" >.venv/.lock-hash
fi
echo "set-up: compiling the engine" >&2
.venv/bin/uv pip install --quiet --python .venv/bin/python --no-build-isolation --no-deps -e . ||
    fail "the engine could not be compiled; the compiler's lines are above"
.venv/bin/python -m compileall -q flows components model runtime_cpu || true # only saves time
touch .venv/.ready
