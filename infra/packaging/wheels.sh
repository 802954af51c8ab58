#!/usr/bin/env bash
# `make wheels`: an environment for the tools of infra/packaging/requirements.lock, then infra/packaging/wheels.py.
set -euo pipefail
cd "$(dirname "$0")/../.."

fail() { echo "wheels: $*" >&2; exit 1; }

python=${PYTHON:-python3}
lock=infra/packaging/requirements.lock
venv=.venv-wheels
[ -x $venv/bin/python ] || "$python" -m venv $venv || fail "'$python' makes no environment; Python 3.11 or newer with venv is needed"
if ! cmp -s $lock $venv/.lock; then
    $venv/bin/python -m pip install --quiet --disable-pip-version-check -r $lock ||
        fail "the tools of $lock could not be installed; is the package index reachable?"
    cp $lock $venv/.lock
fi
# Two builds of one commit give the same bytes.
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 315532800)}
export SOURCE_DATE_EPOCH
exec $venv/bin/python infra/packaging/wheels.py "$@"
