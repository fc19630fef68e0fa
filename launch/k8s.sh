#!/usr/bin/env bash
# Trains on Kubernetes as a JobSet: on machines with GPUs, or on a TPU slice of GKE.
#
#   launch/k8s.sh --config configs/voco_10k.py --workdir /data/runs/10k \
#       --config.data.sources.ct.cache=/data/cache
#   PRINT=1 launch/k8s.sh ... # the YAML, and nothing else
#
# Needs JobSet 0.10 or later in the cluster, an image built from launch/Dockerfile, and a volume
# claim that all pods mount (ReadWriteMany).
set -euo pipefail

# ---- settings: edit here, or set them in the environment
K8S_JOB=${K8S_JOB:-voco}
K8S_IMAGE=${K8S_IMAGE:-example.com/voco:1}
K8S_CLAIM=${K8S_CLAIM:-voco}                 # mounted at /data
K8S_ACCELERATOR=${K8S_ACCELERATOR:-gpu}      # gpu or tpu
K8S_NODES=${K8S_NODES:-}                     # machines (default 2); of a TPU slice: its hosts (4)
K8S_PER_NODE=${K8S_PER_NODE:-}               # GPUs (8) or TPU chips (4) of each
K8S_TPU_TYPE=${K8S_TPU_TYPE:-tpu-v6e-slice}  # the node pool's gke-tpu-accelerator
K8S_TPU_TOPOLOGY=${K8S_TPU_TOPOLOGY:-4x4}    # and its gke-tpu-topology
K8S_MAX_CRASHES=${K8S_MAX_CRASHES:-3}        # restarts; those after a preemption do not count
PRINT=${PRINT:-}

case $K8S_ACCELERATOR in
  gpu)
    : "${K8S_NODES:=2}" "${K8S_PER_NODE:=8}"
    platforms=cuda,cpu
    resource=nvidia.com/gpu
    annotations="{}"
    selector="{}"
    security="{runAsUser: 1000, runAsGroup: 1000, runAsNonRoot: true,
      allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}"
    xla_flags=--xla_gpu_enable_latency_hiding_scheduler=true
    ;;
  tpu)
    : "${K8S_NODES:=4}" "${K8S_PER_NODE:=4}"
    platforms=tpu,cpu
    if ((K8S_NODES * K8S_PER_NODE != ${K8S_TPU_TOPOLOGY//x/*})); then
      echo "k8s.sh: found $K8S_NODES nodes of $K8S_PER_NODE chips for K8S_TPU_TOPOLOGY" \
        "$K8S_TPU_TOPOLOGY, expected as many chips" >&2
      exit 2
    fi
    resource=google.com/tpu
    # All pods on one node pool, which is one slice.
    annotations="{alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool}"
    selector="{cloud.google.com/gke-tpu-accelerator: $K8S_TPU_TYPE,
      cloud.google.com/gke-tpu-topology: $K8S_TPU_TOPOLOGY}"
    # libtpu locks memory and opens the devices. Such a container has no seccomp profile.
    security="{runAsUser: 0, privileged: true}"
    xla_flags=
    ;;
  *)
    echo "k8s.sh: K8S_ACCELERATOR is $K8S_ACCELERATOR, expected gpu or tpu" >&2
    exit 2
    ;;
esac

# A JSON string is one in YAML too; in arguments Kubernetes itself replaces $(NAME), and $$ by $.
arguments=
for argument in "$@"; do
  argument=${argument//\\/\\\\}
  argument=${argument//\"/\\\"}
  argument=${argument//$'\n'/\\n}
  arguments+="\"${argument//\$/\$\$}\", "
done
if [ "$K8S_ACCELERATOR" = gpu ]; then # JAX finds out by itself on TPUs
  arguments+="--coordinator=$K8S_JOB-workers-0-0.$K8S_JOB:55527, --processes=$K8S_NODES, "
  arguments+="--process_id=\$(PROCESS_ID)"
fi

manifest() {
  cat <<END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $K8S_JOB
  annotations: $annotations
spec:
  failurePolicy:
    maxRestarts: $K8S_MAX_CRASHES
    restartStrategy: BlockingRecreate # the old pods still hold the devices
    rules: # the index is that of podFailurePolicy's rule below
      - name: hopeless
        action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
        onJobFailureMessagePatterns: ["rule at index 0\$"]
      - name: preempted
        action: RestartJobSetAndIgnoreMaxRestarts
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: workers
      replicas: 1
      template:
        spec:
          completionMode: Indexed
          completions: $K8S_NODES
          parallelism: $K8S_NODES
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob # bad input, diverged
                onExitCodes: {containerName: main, operator: In, values: [2, 3]}
              - action: FailJob # stopped by SIGTERM, everything is saved
                onExitCodes: {containerName: main, operator: In, values: [75]}
              - action: FailJob # the machine was taken away
                onPodConditions: [{type: DisruptionTarget, status: "True"}]
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 300 # to save
              nodeSelector: $selector
              tolerations:
                - {key: $resource, operator: Exists, effect: NoSchedule}
              securityContext:
                fsGroup: 1000
                fsGroupChangePolicy: OnRootMismatch
                seccompProfile: {type: RuntimeDefault}
              containers:
                - name: main
                  image: "$K8S_IMAGE"
                  args: [$arguments]
                  securityContext: $security
                  env:
                    - name: PROCESS_ID
                      valueFrom: {fieldRef: {fieldPath:
                        "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
                    - {name: JAX_COMPILATION_CACHE_DIR, value: /data/xla_cache}
                    - {name: XLA_FLAGS, value: "$xla_flags"}
                    # Named, a missing driver is an error; else JAX would train on the CPU.
                    - {name: JAX_PLATFORMS, value: "$platforms"}
                  resources:
                    limits: {$resource: $K8S_PER_NODE}
                  volumeMounts:
                    - {name: data, mountPath: /data}
                    - {name: shared-memory, mountPath: /dev/shm}
              volumes:
                - {name: data, persistentVolumeClaim: {claimName: "$K8S_CLAIM"}}
                # The data workers' batches; a container has 64 MiB otherwise.
                - {name: shared-memory, emptyDir: {medium: Memory}}
END
}

if [ -n "$PRINT" ]; then
  manifest
  exit
fi
# Not apply: that would leave a JobSet of this name that has ended as it is, and say nothing.
if ! manifest | kubectl create -f -; then
  echo "k8s.sh: if $K8S_JOB exists, remove it first: kubectl delete jobset $K8S_JOB" >&2
  exit 1
fi
echo "The log: kubectl logs -f -l \
jobset.sigs.k8s.io/jobset-name=$K8S_JOB,batch.kubernetes.io/job-completion-index=0"
