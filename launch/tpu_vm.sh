#!/usr/bin/env bash
# Trains on an existing TPU VM slice: sets up every worker, then starts the same command on all. Run it where gcloud is
# configured. Run again, it resumes.
set -euo pipefail

# ---- edit here ----
TPU=my-slice
ZONE=us-central2-b
PROJECT=my-project
REPOSITORY=https://github.com/you/mto_jax.git
REVISION=main  # better a tag or a full commit hash: restarts of a run must not change its code
WORKDIR=gs://my-bucket/runs/mae_mto
ARGS="--config=configs/mae_mto.py --config.data.data_dir=gs://my-bucket/tensorflow_datasets"
# -------------------

on_all() { gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --project="$PROJECT" --worker=all --command="$1"; }

# The images' own Python may be older than 3.11, so uv brings one.
on_all "set -e
test -d mto_jax || git clone -q $REPOSITORY mto_jax
cd mto_jax
git fetch -q origin $REVISION
git checkout -q FETCH_HEAD
command -v ~/.local/bin/uv > /dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
test -d .venv || ~/.local/bin/uv venv -q --python 3.12 .venv
~/.local/bin/uv pip install -q --python .venv -r requirements-tpu.txt"
# What is compiled once is there after a restart.
on_all "cd mto_jax && JAX_COMPILATION_CACHE_DIR=$WORKDIR-compiled .venv/bin/python main.py --workdir=$WORKDIR $ARGS"
