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
state() {
  local found
  if found=$(gcloud compute tpus queued-resources describe "$TPU" "${where[@]}" --format='value(state.state)' 2>&1); then
    echo "$found"
  elif [[ $found == *NOT_FOUND* ]]; then
    echo NOT_FOUND
  else
    echo UNKNOWN # such as a network that is down: nothing is to be deleted for that
  fi
}
remove() { gcloud compute tpus queued-resources delete "$TPU" "${where[@]}" --force --quiet; }

failures=0
while true; do
  now=$(state)
  case $now in
    ACTIVE)
      began=$SECONDS
      "$(dirname "$0")/tpu_vm.sh" && break
      ((SECONDS - began < 3600)) || failures=0 # it trained: maintenance, say, ended it
      if [[ $(state) == ACTIVE ]] && ((++failures == 5)); then
        echo "the training failed five times on a live slice: see its output. The slice is kept; delete it by hand" >&2
        exit 1
      fi
      ;;
    SUSPENDED | FAILED | NOT_FOUND)
      failures=0
      [[ $now == NOT_FOUND ]] || remove || true
      gcloud compute tpus queued-resources create "$TPU" "${where[@]}" --node-id="$TPU" \
        --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" --spot || true
      ;;
  esac
  sleep 60
done
remove
