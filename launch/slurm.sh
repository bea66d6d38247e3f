#!/usr/bin/env bash
# GPU nodes under SLURM: sbatch launch/slurm.sh. One process a node, with all its GPUs. A job that is pre-empted or
# reaches its time limit saves first (SIGTERM comes 120 s before) and is queued again.

# ---- edit here ----
#SBATCH --job-name=mto_jax
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
WORKDIR=/shared/runs/mae_mto
ARGS="--config=configs/mae_mto.py --config.data.data_dir=/shared/tensorflow_datasets"
# -------------------
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --signal=TERM@120
set -uo pipefail
cd "$SLURM_SUBMIT_DIR"

if [[ ! -d .venv ]]; then
  python3 -c 'import sys; assert sys.version_info >= (3, 11), sys.version'
  python3 -m venv .venv && .venv/bin/pip install -q -r requirements-gpu.txt
fi
# srun tells every process its number; hosts.coordinator='auto' reads it. Exit code 143: saved, to be resumed.
srun .venv/bin/python main.py --workdir="$WORKDIR" $ARGS
code=$?
[[ $code -eq 143 ]] && scontrol requeue "$SLURM_JOB_ID"
exit $code
