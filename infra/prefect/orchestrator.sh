#!/usr/bin/env bash
# A local Prefect server with this project's deployments and one worker, until Ctrl-C: `make orchestrator`.
set -euo pipefail
cd "$(dirname "$0")/../.."
export DO_NOT_TRACK=1 PREFECT_LOGGING_LEVEL=${PREFECT_LOGGING_LEVEL:-INFO}
export PREFECT_API_URL=${PREFECT_API_URL:-http://127.0.0.1:4200/api}
prefect=.venv/bin/prefect
port=${PREFECT_API_URL##*:}
port=${port%%/*}
server=
worker=
stop() {
    trap '' INT TERM
    for signal in TERM KILL; do # a worker in the middle of something takes its time
        for process in $worker $server; do kill -"$signal" "$process" 2>/dev/null || true; done
        for _ in $(seq 20); do
            [ -n "$(jobs -rp)" ] || return 0
            sleep 0.5
        done
    done
}
trap stop EXIT
trap 'exit 0' INT TERM

healthy() { .venv/bin/python -c "import urllib.request as u; u.urlopen('$PREFECT_API_URL/health', timeout=10)" 2>/dev/null; }

if ! healthy; then
    mkdir -p .prefect
    PREFECT_UI_API_URL=$PREFECT_API_URL $prefect server start --host 127.0.0.1 --port "$port" >.prefect/server.log 2>&1 &
    server=$!
    for _ in $(seq 1200); do
        healthy && break
        kill -0 "$server" 2>/dev/null || { tail -5 .prefect/server.log >&2; echo "the Prefect server did not start" >&2; exit 1; }
        sleep 0.5
    done
    healthy || { echo "the Prefect server did not answer within ten minutes; see .prefect/server.log" >&2; exit 1; }
fi
$prefect work-pool inspect local >/dev/null 2>&1 || $prefect work-pool create --type process local >/dev/null
$prefect --no-prompt deploy --all
echo "Prefect's pages: http://127.0.0.1:$port    try: .venv/bin/prefect deployment run pretrain-21b" >&2
$prefect worker start --pool local --type process &
worker=$!
wait "$worker"
