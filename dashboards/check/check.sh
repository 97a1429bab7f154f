#!/bin/sh
# make dashboards-check: checks the dashboards' JSON against Grafana's own data model, then draws every panel with
# Grafana's components from a small training run under a real Prometheus, and once more from simulated ranks with GPUs.
# Pictures go to $OUT. Not a part of CI: it installs some 500 MB of packages into ~/.cache/repa-dist.
#
# REPA is the binary. Wants python3 with venv, and node with npm, prometheus and chromium for the pictures.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
cache=${CACHE:-$HOME/.cache/repa-dist/dashboards-check}
out=${OUT:-$cache/pictures}
: "${REPA:=repa-dist}"
say() { printf 'dashboards-check: %s\n' "$*"; }
stop() { say "stopped: $*"; exit 0; }

mkdir -p "$cache"
command -v python3 >/dev/null || stop "no python3"
if [ ! -x "$cache/venv/bin/python" ]; then
    python3 -m venv "$cache/venv" || stop "python3 has no venv (Debian's package is python3-venv)"
fi
"$cache/venv/bin/pip" install -q --disable-pip-version-check 'grafana-foundation-sdk==1769699379!11.6.0'
python3 "$here/../grafana/generate.py" --check
PYTHONDONTWRITEBYTECODE=1 "$cache/venv/bin/python" "$here/roundtrip.py"

for program in node npm prometheus chromium mpirun; do
    command -v $program >/dev/null || stop "no $program, so nothing is drawn; Debian has a package for it"
done
if ! cmp -s "$here/package.json" "$cache/package.json"; then
    say "installing Grafana's components into $cache"
    cp "$here/package.json" "$cache/package.json.new"
    (cd "$cache" && cp package.json.new package.json && npm i --ignore-scripts --legacy-peer-deps --no-audit --no-fund --silent) ||
        { rm -f "$cache/package.json"; stop "npm could not install them"; }
fi

work=$(mktemp -d)
started=
finish() {
    for id in $started; do kill "$id" 2>/dev/null || true; done
    wait
    rm -rf "$work"
}
trap finish EXIT
trap 'exit 1' INT TERM

cd "$work"
say "training the quickstart on 4 ranks"
"$REPA" data quickstart >/dev/null 2>&1
OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 timeout 900 mpirun --oversubscribe --bind-to none \
    --mca mpi_yield_when_idle 1 -n 4 "$REPA" train train.steps=1000000 checkpoint.every=50 telemetry.progress=off >training.log 2>&1 &
started="$started $!"
python3 "$here/ranks.py" runs/simulated 0 &
started="$started $!"
"$REPA" dashboards monitoring --run runs/quickstart --run runs/simulated >/dev/null
sed -i 's/interval: 5s/interval: 1s/' monitoring/prometheus/prometheus.yml
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
timeout 900 prometheus --config.file monitoring/prometheus/prometheus.yml --storage.tsdb.path tsdb \
    --web.listen-address "127.0.0.1:$port" --log.level=warn &
started="$started $!"
seconds=${SECONDS_SHOWN:-120}
say "waiting for $seconds s of it"
sleep $((seconds + 15))
failed=0
RUN=quickstart CHECK_SECONDS=$seconds node "$here/render.mjs" "$cache" "http://127.0.0.1:$port" "$out/training" || failed=1
RUN=simulated CHECK_SECONDS=$seconds node "$here/render.mjs" "$cache" "http://127.0.0.1:$port" "$out/simulated" --all || failed=1
[ $failed = 0 ] || { tail -n 5 training.log >&2; exit 1; }
say "every panel has data where it should; look at the pictures in $out"
