#!/usr/bin/env bash
# Trains on the GPUs of a SLURM cluster, one process a GPU. From the repository's root:
#
#   sbatch launch/slurm.sh --config configs/voco_10k.py --workdir /shared/runs/10k
#
# Before the time limit, and when preempted, everything is saved and the job queued again.

# ---- settings: edit here; options of sbatch itself go before them (sbatch --nodes=4 launch/...)
#SBATCH --job-name=voco
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
# As many GPUs as tasks, all visible to each: with --gpus-per-task NCCL cannot see its neighbours.
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
# To main.py's processes (B:TERM would be to this shell alone), this many seconds before the end.
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append

set -u
VENV=${VENV:-}                # empty: the environment in which sbatch was called
MAX_CRASHES=${MAX_CRASHES:-3} # restarts in one allocation
RETRY_SECONDS=${RETRY_SECONDS:-10}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/voco_jax/xla}
# Named, a missing driver is an error; else JAX would train on the CPU.
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu}
export XLA_FLAGS=${XLA_FLAGS:---xla_gpu_enable_latency_hiding_scheduler=true}

if [ -n "$VENV" ]; then
  # shellcheck disable=SC1091
  source "$VENV/bin/activate" || exit 2
fi
# Processes would look for each other through the proxy.
unset http_proxy https_proxy HTTP_PROXY HTTPS_PROXY all_proxy ALL_PROXY
# Since 22.05 srun does not take --cpus-per-task over from sbatch.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}

for ((crashes = 0; crashes <= MAX_CRASHES; crashes++)); do
  if [ "$crashes" -gt 0 ]; then
    echo "slurm.sh: status $status; restart $crashes of $MAX_CRASHES" >&2
    sleep "$RETRY_SECONDS"
  fi
  # Some clusters kill all tasks when the first ends; here they need time to save and export.
  srun --kill-on-bad-exit=0 --wait=600 python main.py "$@"
  status=$?
  case $status in
    0 | 2 | 3 | 75) break ;;
  esac
done

# A job that scancel ends, or that Slurm queues again itself, is no longer "running".
if [ "$status" -eq 75 ] && [[ $(scontrol show job "$SLURM_JOB_ID") == *JobState=RUNNING* ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
