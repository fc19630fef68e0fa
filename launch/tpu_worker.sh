#!/usr/bin/env bash
# What launch/tpu_pod.sh does on each worker: tpu_worker.sh install | run FLAGS
set -euo pipefail
cd "$(dirname "$0")/.."
UV=uv==0.13.9

case $1 in
  install)
    if [ -n "$NFS_SHARE" ] && ! mountpoint -q "$NFS_MOUNT"; then
      # A new machine's own updates hold apt's lock for some minutes.
      sudo apt-get -o DPkg::Lock::Timeout=600 -qq update
      sudo apt-get -o DPkg::Lock::Timeout=600 -qq install -y nfs-common
      sudo mkdir -p "$NFS_MOUNT"
      sudo mount -t nfs "$NFS_SHARE" "$NFS_MOUNT"
      sudo chmod 777 "$NFS_MOUNT" # a new share is root's
    fi
    # The machines' own Python is too old; uv brings one along. It is for this user alone; newer
    # systems refuse even that unless told.
    [ -x ~/.local/bin/uv ] || PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user "$UV"
    [ -d ~/voco_env ] || ~/.local/bin/uv venv --quiet --python 3.13 ~/voco_env
    ~/.local/bin/uv pip install --quiet --python ~/voco_env/bin/python \
      -r requirements.lock "jax[tpu]"
    ;;
  run)
    shift
    export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$NFS_MOUNT/xla_cache}
    # Named, a TPU that cannot be opened is an error; else JAX would train on the CPU.
    export JAX_PLATFORMS=${JAX_PLATFORMS:-tpu,cpu}
    # A lost connection can leave a process behind that holds the TPU: SIGTERM has it save and end.
    fuser -k -TERM ~/voco.lock >/dev/null 2>&1 || true
    flock --timeout 120 ~/voco.lock true || fuser -k -KILL ~/voco.lock >/dev/null 2>&1 || true
    exec flock ~/voco.lock ~/voco_env/bin/python main.py "$@"
    ;;
esac
