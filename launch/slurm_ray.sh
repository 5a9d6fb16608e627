#!/usr/bin/env bash
# SLURM: segment_dataset on a Ray cluster of any number of nodes, with one actor per GPU.
#
#   sbatch --nodes=4 --time=12:00:00 launch/slurm_ray.sh "/shared/cc3m/{00000..00331}.tar" \
#       /shared/masks --checkpoint=/shared/runs/vits16 --words="dog, grass" \
#       --actors=32 --gpus_per_actor=1
#
# Environment: submit from the clone, in which .venv holds `pip install -e ".[cuda,ray,parquet]"`, on
#   a file system that all nodes see; VENV names another virtual environment.
# Data and results: on that file system, or addresses (gs://, s3://, with the extra cloud).
# Preemption and restart: finished files are kept, whatever is killed. Unless the job is done (status
#   0) or has a mistake in its command (2), it goes back to the queue, at most RESTARTS times, and
#   continues, also with another --nodes.
#SBATCH --job-name=simseg_jax_ray
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

# shellcheck disable=SC1091
source "${VENV:-.venv}/bin/activate"

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
status=0
# Starts Ray on every node, runs the command on the first one, and stops Ray.
srun --kill-on-bad-exit=0 ray symmetric-run --address "${hosts%%$'\n'*}:${PORT:-6379}" \
    --min-nodes "$SLURM_JOB_NUM_NODES" -- \
    python -m simseg_jax.segment_dataset "$@" --address=auto || status=$?
if [ "$status" -eq 0 ] || [ "$status" -eq 2 ]; then
    exit "$status"
fi
if [ "${SLURM_RESTART_COUNT:-0}" -ge "${RESTARTS:-20}" ]; then
    echo "Ended with status $status after ${SLURM_RESTART_COUNT:-0} restarts: giving up." >&2
    exit "$status"
fi
echo "Ended with status $status: back to the queue." >&2
scontrol requeue "$SLURM_JOB_ID"
