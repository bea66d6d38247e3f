#!/usr/bin/env bash
# Compiles the train steps of BootMAE and ConMIM, ViT-B with MTO and 64 images a chip, for TPU slices (no TPU needed):
#
#     PYTHON=.venv-tpu/bin/python benchmarks/tpu.sh v5e:2x2 v5e:8x8 v4:4x4x4 > benchmarks/results/tpu.txt
#
# PYTHON has requirements-tpu.txt. Some minutes each; docs/tpu.md has the figures.
set -euo pipefail
for topology in "$@"; do
  for config in bootmae_mto conmim_mto; do
    echo "config: $config"
    "${PYTHON:-python}" -m mto_jax.tools.compile_tpu \
      --config=configs/$config.py --topology=$topology --per_chip_batch=64 2> >(grep -v 'host bounds' >&2)
  done
done
