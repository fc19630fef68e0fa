#!/usr/bin/env bash
# Trains on a Cloud TPU pod slice until it is done, through preemptions and crashes.
#
#   launch/tpu_pod.sh --config configs/voco_10k.py --workdir /mnt/voco/runs/10k \
#       --config.data.sources.ct.cache=/mnt/voco/cache
#
# Asks for the slice (a queued resource), waits, installs, runs main.py on all workers; a slice
# that was taken away is asked for again. Deletes the slice when training is done. The same
# command again picks up wherever things are. Keep it going on a machine that stays up (tmux).
set -euo pipefail
cd "$(dirname "$0")/.."

# ---- settings: edit here, or set them in the environment
TPU_PROJECT=${TPU_PROJECT:-my-project}
TPU_ZONE=${TPU_ZONE:-us-east5-a}
TPU_NAME=${TPU_NAME:-voco}
TPU_TYPE=${TPU_TYPE:-v6e-16}
TPU_RUNTIME=${TPU_RUNTIME:-v2-alpha-tpuv6e}
TPU_TIER=${TPU_TIER---spot}                # --spot, --reserved, --guaranteed, or nothing
NFS_SHARE=${NFS_SHARE-10.0.0.2:/voco}      # for data and workdir; empty: mounted by other means
NFS_MOUNT=${NFS_MOUNT:-/mnt/voco}          # where all workers see it
MAX_CRASHES=${MAX_CRASHES:-3}              # in a row
POLL_SECONDS=${POLL_SECONDS:-60}

place=(--project="$TPU_PROJECT" --zone="$TPU_ZONE")
scratch=$(mktemp -d)

say() { echo "tpu_pod.sh: $*"; }

queue() { gcloud compute tpus queued-resources "$1" "$TPU_NAME" "${place[@]}" --quiet "${@:2}"; }

leave() {
  local status=$?
  rm -rf "$scratch"
  if [ "$status" -ne 0 ]; then
    say "ended with status $status. If the slice is still there it costs money; to delete it:"
    say "  gcloud compute tpus queued-resources delete $TPU_NAME ${place[*]} --force"
  fi
}
trap leave EXIT

state() { # of the queued resource; NONE: there is none
  for _ in 1 2 3 4 5; do
    if queue describe --format="value(state.state)" 2>"$scratch/errors"; then
      return
    elif grep -q NOT_FOUND "$scratch/errors"; then
      echo NONE
      return
    fi
    cat "$scratch/errors" >&2
    sleep "$POLL_SECONDS"
  done
  return 1
}

on_workers() {
  # Workers say nothing for days: without signs of life a machine that is gone shows after hours.
  gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${place[@]}" --quiet --worker=all --command="$1" \
    --ssh-flag=-oServerAliveInterval=60 --ssh-flag=-oServerAliveCountMax=5
}

install() { # the working tree as it is now, and its packages
  tar -czf "$scratch/voco_jax.tar.gz" --exclude=__pycache__ \
    main.py requirements.lock configs voco_jax launch &&
    gcloud compute tpus tpu-vm scp "$scratch/voco_jax.tar.gz" "$TPU_NAME:" "${place[@]}" \
      --quiet --worker=all &&
    on_workers "mkdir -p voco_jax && tar -xzf voco_jax.tar.gz -C voco_jax && $worker install"
}

worker=$(printf 'NFS_SHARE=%q NFS_MOUNT=%q bash voco_jax/launch/tpu_worker.sh' \
  "$NFS_SHARE" "$NFS_MOUNT")
flags=$(printf ' %q' "$@")

crashes=0
crashed=
refused=0
while true; do
  current=$(state)
  if [ -n "$crashed" ] && [ "$current" = ACTIVE ]; then # no preemption: its own fault
    crashes=$((crashes + 1))
    [ "$crashes" -le "$MAX_CRASHES" ] || exit 1
    say "restart $crashes of $MAX_CRASHES"
  fi
  crashed=
  case $current in
    NONE)
      say "asking for $TPU_TYPE"
      queue create --node-id="$TPU_NAME" --accelerator-type="$TPU_TYPE" \
        --runtime-version="$TPU_RUNTIME" ${TPU_TIER:+"$TPU_TIER"}
      ;;
    ACTIVE)
      refused=0
      start=$SECONDS
      status=0
      say "installing on all workers"
      if install; then
        say "training"
        on_workers "$worker run$flags" || status=$?
      else
        status=1
      fi
      case $status in
        0)
          say "done; deleting the slice"
          queue delete --force
          exit 0
          ;;
        2 | 3) exit "$status" ;; # bad input, diverged: would only happen again
        75) say "stopped by a signal; everything is saved" ;;
        *)
          say "status $status"
          crashed=yes
          [ $((SECONDS - start)) -lt 3600 ] || crashes=0
          ;;
      esac
      sleep "$POLL_SECONDS" # a preemption shows in the state only after a while
      ;;
    FAILED | SUSPENDED)
      say "the slice is $current"
      queue describe --format="value(state)" || true
      if [ "$current" = FAILED ]; then
        refused=$((refused + 1))
        [ "$refused" -le 3 ] || exit 1
      fi
      queue delete --force
      ;;
    *)
      say "waiting ($((SECONDS / 60)) min): $current"
      sleep "$POLL_SECONDS"
      ;;
  esac
done
