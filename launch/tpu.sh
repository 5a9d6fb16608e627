#!/usr/bin/env bash
# Cloud TPU: one slice of any size, one process per host, from a queued resource.
#
#   TPU=simseg ZONE=europe-west4-b TYPE=v5litepod-64 VERSION=v2-alpha-tpuv5-lite BUCKET=gs://mine \
#       launch/tpu.sh --config=configs/vits16.py \
#       --config.data.train.cc3m.path=gs://mine/cc3m --config.data.train.cc12m.path=gs://mine/cc12m
#
# Environment: gcloud, logged in, with a project; REPOSITORY and COMMIT say what the hosts install.
#   SPOT=1 asks for cheaper capacity that can be taken away at any time.
# Memory: 128 pairs of configs/vits16.py fit on a chip of v5e without options, 1024 with
#   --config.remat=full; see docs/guides/scaling.md.
# Data: addresses in a bucket of the same region, read with gcsfs; `prepare` writes the shards.
# Checkpoints: BUCKET/TPU/checkpoints, through --config.checkpoint.directory. The rest of --workdir
#   (metrics, pictures, vocabulary) is copied to BUCKET/TPU from host 0 when the run ends.
# Preemption and restart: a slice that is taken away, or whose hosts fail, is deleted and asked for
#   again, at most RESTARTS times; the run continues from its newest checkpoint, also with another
#   TYPE. Status 2, a mistake in the command, ends it. The slice is deleted in the end.
# Several slices: launch/jobset_tpu.yaml.
set -euo pipefail

: "${TPU:?name of the slice}" "${ZONE:?zone}" "${TYPE:?accelerator type, such as v5litepod-64}"
: "${VERSION:?runtime version, such as v2-alpha-tpuv5-lite}" "${BUCKET:?bucket, gs://...}"
repository=${REPOSITORY:-$(git remote get-url origin)}
commit=${COMMIT:-$(git rev-parse HEAD)}

state() {
    gcloud compute tpus queued-resources describe "$TPU" --zone="$ZONE" \
        --format='value(state.state)' 2>/dev/null || echo NONE
}

delete() {
    if [ "$(state)" != NONE ]; then
        gcloud compute tpus queued-resources delete "$TPU" --zone="$ZONE" --force --quiet
    fi
}

request() {
    local spot=()
    [ -z "${SPOT:-}" ] || spot=(--spot)
    gcloud compute tpus queued-resources create "$TPU" --node-id="$TPU" --zone="$ZONE" \
        --accelerator-type="$TYPE" --runtime-version="$VERSION" "${spot[@]}"
    until [ "$(state)" = ACTIVE ]; do
        case $(state) in FAILED | SUSPENDED) return 1 ;; esac
        sleep 30
    done
}

hosts() { # which of them, command
    gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker="$1" --command="$2"
}

install="rm -rf simseg_jax && git clone --quiet $(printf '%q' "$repository") simseg_jax &&
    cd simseg_jax && git checkout --quiet $commit &&
    python3 -m venv .venv && .venv/bin/pip install --quiet '.[tpu,cloud]'"
# Quoted once more: the remote shell reads it again.
arguments=$(printf ' %q' "$@" --workdir=run "--config.checkpoint.directory=$BUCKET/$TPU/checkpoints")
train="cd simseg_jax && .venv/bin/python -m simseg_jax.main $arguments --distributed
    echo \$? > status"

trap delete EXIT
for attempt in $(seq 0 "${RESTARTS:-20}"); do
    delete
    # Through a file: ssh to many hosts does not tell how each of them ended.
    { request && hosts all "$install" && hosts all "$train"; } || true
    status=$(hosts 0 "cat simseg_jax/status" || echo 1)
    hosts 0 "gcloud storage cp --recursive simseg_jax/run $BUCKET/$TPU" || true
    if [ "$status" -eq 0 ] || [ "$status" -eq 2 ]; then
        exit "$status"
    fi
    echo "Attempt $attempt ended with status $status." >&2
done
exit "$status"
