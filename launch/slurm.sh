#!/usr/bin/env bash
# GPU nodes under SLURM: sbatch launch/slurm.sh. One process per node, with all its GPUs. A job that is pre-empted or
# reaches its time limit saves first (SIGTERM comes 120 s before) and is queued again.

# sbatch reads its lines up to the first command: keep them above.
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --signal=TERM@120
# ---- edit here ----
#SBATCH --job-name=mto_jax
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
PYTHON=python3  # 3.11 or newer; a module or a conda environment may be loaded here
WORKDIR=/shared/runs/mae_mto
ARGS="--config=configs/mae_mto.py --config.data.data_dir=/shared/tensorflow_datasets"
# -------------------
set -uo pipefail
cd "$SLURM_SUBMIT_DIR"

if [[ ! -f .venv/ready ]]; then
  "$PYTHON" -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer, please: edit PYTHON")' || exit 2
  "$PYTHON" -m venv .venv && .venv/bin/pip install -q -r requirements-gpu.txt && touch .venv/ready || exit 2
fi
# SLURM 22.05 to 23.02 does not hand --cpus-per-task on to srun by itself.
[[ -n ${SLURM_CPUS_PER_TASK:-} ]] && export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
# srun tells every process its number; hosts.coordinator='auto' reads it. Exit code 143: saved, to be resumed.
srun .venv/bin/python main.py --workdir="$WORKDIR" $ARGS
code=$?
[[ $code -eq 143 ]] && scontrol requeue "$SLURM_JOB_ID"
exit $code
