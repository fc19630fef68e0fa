#!/usr/bin/env bash
# Starts several processes of main.py on this machine, as one run.
#
#   JAX_NUM_CPU_DEVICES=1 PROCESSES=2 launch/local.sh --config configs/demo.py \
#       --workdir runs/two --config.batch_size=2
#
# On CPUs JAX_NUM_CPU_DEVICES says how many devices each process has; on GPUs each has one.
# Ctrl-C and SIGTERM save and stop, a second Ctrl-C kills. Ends with 0: all are done; 75: stopped,
# everything is saved; else the status of the process that failed first.
set -u

# ---- settings: edit here, or set them in the environment
PROCESSES=${PROCESSES:-2}
GRACE_SECONDS=${GRACE_SECONDS:-60} # what is left for the others when one has failed
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/voco_jax/xla}
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-lo} # no other machine is to reach the processes
# export XLA_FLAGS=--xla_gpu_enable_latency_hiding_scheduler=true # on GPUs

[ "$PROCESSES" -ge 1 ] || exit 2
main=$(dirname "$0")/../main.py

# A port on which nothing listens, below those that the system hands out itself.
port=$((20000 + RANDOM % 10000))
while (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do
  port=$((20000 + RANDOM % 10000))
done

running=
send() {
  for pid in $running; do
    kill -s "$1" "$pid" 2>/dev/null
  done
}

# Background processes of a script ignore SIGINT, so it is passed on as SIGTERM.
interrupted=
trap 'send TERM' TERM
trap 'send "${interrupted:-TERM}"; interrupted=KILL' INT

for ((id = 0; id < PROCESSES; id++)); do
  JAX_LOCAL_DEVICE_IDS=${JAX_LOCAL_DEVICE_IDS:-$id} python "$main" "$@" \
    --coordinator="127.0.0.1:$port" --processes="$PROCESSES" --process_id="$id" &
  running="$running $!"
done

result=0
deadline=
while [ -n "$running" ]; do
  left=
  for pid in $running; do
    if kill -0 "$pid" 2>/dev/null; then
      left="$left $pid"
      continue
    fi
    wait "$pid"
    status=$?
    if [ "$status" -ne 0 ]; then
      deadline=${deadline:-$((SECONDS + GRACE_SECONDS))}
      if [ "$result" -eq 0 ] || [ "$result" -eq 75 ]; then
        result=$status
      fi
    fi
  done
  running=$left
  if [ -n "$running" ]; then
    if [ -n "$deadline" ] && [ "$SECONDS" -ge "$deadline" ]; then
      echo "local.sh: one process ended with status $result; killing the others" >&2
      send KILL
    fi
    sleep 0.2
  fi
done
exit "$result"
