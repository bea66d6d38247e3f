#!/usr/bin/env bash
# Trains on a spot slice asked for as a queued resource, and starts over whenever it was taken away, until the training
# has ended. Runs for as long as the training, so start it in tmux or on a small machine. It uses tpu_vm.sh: edit both.
set -uo pipefail

# ---- edit here (TPU, ZONE, PROJECT as in tpu_vm.sh) ----
TPU=my-slice
ZONE=us-central2-b
PROJECT=my-project
ACCELERATOR=v4-128
RUNTIME=tpu-ubuntu2204-base
# ---------------------------------------------------------

where=(--zone="$ZONE" --project="$PROJECT")
state() { gcloud compute tpus queued-resources describe "$TPU" "${where[@]}" --format='value(state.state)' 2>/dev/null; }

until [[ $(state) == ACTIVE ]] && "$(dirname "$0")/tpu_vm.sh"; do
  case $(state) in
    ACTIVE | CREATING | ACCEPTED | PROVISIONING | WAITING_FOR_RESOURCES) ;;
    *)
      gcloud compute tpus queued-resources delete "$TPU" "${where[@]}" --force --quiet || true
      gcloud compute tpus queued-resources create "$TPU" "${where[@]}" --node-id="$TPU" \
        --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" --spot || true
      ;;
  esac
  sleep 60
done
gcloud compute tpus queued-resources delete "$TPU" "${where[@]}" --force --quiet
