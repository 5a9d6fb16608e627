#!/usr/bin/env bash
# SLURM: one process per GPU on any number of nodes.
#
#   sbatch --nodes=4 --time=24:00:00 launch/slurm.sh \
#       --config=configs/vits16.py --workdir=/shared/runs/vits16 \
#       --config.data.train.cc3m.path=/shared/cc3m --config.data.train.cc12m.path=/shared/cc12m
#
# Environment: submit from the clone, in which .venv holds `pip install -e ".[cuda]"`, on a file
#   system that all nodes see; VENV names another virtual environment.
# Memory: configs/vits16.py fits on 8 H100 without options up to 16,384 pairs, on one with
#   --config.remat=full; see docs/guides/scaling.md.
# Data: on the same file system, or an address (gs://, s3://, hf://, with its fsspec driver). The
#   threads and workers of `data` count per process.
# Checkpoints: in --workdir, which all nodes must see, or on object storage with
#   --config.checkpoint.directory=gs://BUCKET/vits16.
# Preemption and restart: SIGTERM, which SLURM sends five minutes before the time limit and when it
#   preempts the job, saves a checkpoint and ends with status 75. Then, and when a node dies, the job
#   goes back to the queue, at most RESTARTS times, and continues from its newest checkpoint, also
#   with another --nodes. Status 2, a mistake in the command, ends it.
#SBATCH --job-name=simseg_jax
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

# shellcheck disable=SC1091
source "${VENV:-.venv}/bin/activate"

status=0
srun --kill-on-bad-exit=1 python -m simseg_jax.main "$@" --distributed || status=$?
if [ "$status" -eq 0 ] || [ "$status" -eq 2 ]; then
    exit "$status"
fi
if [ "${SLURM_RESTART_COUNT:-0}" -ge "${RESTARTS:-20}" ]; then
    echo "Ended with status $status after ${SLURM_RESTART_COUNT:-0} restarts: giving up." >&2
    exit "$status"
fi
echo "Ended with status $status: back to the queue." >&2
scontrol requeue "$SLURM_JOB_ID"
