#!/usr/bin/env bash
# Run wpjax on Kubernetes: as a JobSet, one program on many machines; or a sweep in independent parts.
#
#   jobset.sh --image IMAGE --nodes 2 --gpus 8 --claim results -- sweep ... --out /results/r.nc
#   jobset.sh --image IMAGE --tpu tpu-v5-lite-podslice --topology 4x4 --nodes 4 --claim results -- sweep ...
#   jobset.sh --image IMAGE --gpus 1 --parts 8 --shards /results/parts --out /results/r.nc --claim results -- sweep ...
#
# --dry-run         print the manifest instead of applying it
# --name NAME       name of the JobSet (wpjax)
# --image IMAGE     the Dockerfile beside these scripts, built with --build-arg DEVICE=cuda or tpu and pushed
# --nodes N         machines of one program (1)
# --gpus N          GPUs of a machine, or of a part
# --tpu NAME        in place of GPUs, GKE's name of a TPU: tpu-v5-lite-podslice, tpu-v6e-slice, tpu-v5p-slice
# --topology AxB    with --tpu: chips of the slice, 4x4
# --chips N         with --tpu: chips of a machine (4)
# --claim NAME      a volume claim that all machines may write to, mounted as /results
# --secret NAME     a secret whose entries become variables, such as HF_TOKEN for gated models
# --restarts N      how often it may begin again (3). It goes on where it was. Bad input, which is
#                   exit code 2, ends it
# --parts N         deal a sweep out in N independent parts, which another job then collects
# --shards DIR      with --parts: the folder that all parts share, below /results
# --out FILE        with --parts: the result, below /results
source "$(dirname "$0")/lib.sh"
opt=([name]=wpjax [image]="" [nodes]=1 [gpus]="" [tpu]="" [topology]="" [chips]=4 [claim]="" [secret]="" [restarts]=3 [parts]="" [shards]="" [out]="")
parse "$@"
need image
number nodes gpus chips restarts parts
plain name image tpu topology claim secret
[[ ${opt[name]} =~ ^[a-z0-9]([-a-z0-9]*[a-z0-9])?$ ]] || fail "--name ${opt[name]}: Kubernetes takes small letters, digits and -"
if [[ -n ${opt[tpu]} ]]; then
    need topology
    resource="google.com/tpu: ${opt[chips]}"
else
    need gpus
    resource="nvidia.com/gpu: ${opt[gpus]}"
fi

# job NAME MACHINES COMMAND [AFTER]: one job of the set, on machines that each run the command, after another has ended.
job() {
    echo "- name: $1"
    [[ -z ${4:-} ]] || echo "  dependsOn:
  - name: $4
    status: Complete"
    echo "  replicas: 1
  template:
    spec:
      completionMode: Indexed
      completions: $2
      parallelism: $2
      backoffLimit: ${5:-0}
      podFailurePolicy:
        rules:
        - action: FailJob
          onExitCodes:
            containerName: wpjax
            operator: In
            values: [2]
      template:
        spec:
          restartPolicy: Never"
    [[ -z ${opt[tpu]} ]] || echo "          nodeSelector:
            cloud.google.com/gke-tpu-accelerator: ${opt[tpu]}
            cloud.google.com/gke-tpu-topology: ${opt[topology]}"
    [[ -z ${opt[claim]} ]] || echo "          volumes:
          - name: results
            persistentVolumeClaim:
              claimName: ${opt[claim]}"
    echo "          containers:
          - name: wpjax
            image: ${opt[image]}
            command: [bash, -c]
            args:
            - |"
    indented 14 <<<"$3"
    echo "            ports:
            - containerPort: 12355
            resources:
              limits:
                $resource"
    [[ -z ${opt[secret]} ]] || echo "            envFrom:
            - secretRef:
                name: ${opt[secret]}"
    [[ -z ${opt[claim]} ]] || echo "            env:
            - name: JAX_COMPILATION_CACHE_DIR
              value: /results/compiled
            volumeMounts:
            - name: results
              mountPath: /results"
}

if farmed; then
    [[ -n ${opt[claim]} ]] || fail "--parts needs --claim: the parts share a folder"
    jobs=$(
        job parts "${opt[parts]}" "$(part_of "\$((JOB_COMPLETION_INDEX + 1))")" '' "${opt[restarts]}"
        job collect 1 "$(collecting)" parts
    )
else
    text=$(whole)
    # The machines of a TPU slice find one another. Others are told where the first one is.
    if ((opt[nodes] > 1)) && [[ -z ${opt[tpu]} ]]; then
        text+=" --coordinator ${opt[name]}-run-0-0.${opt[name]}:12355 --num-processes ${opt[nodes]}"
        text+=" --process-id \$JOB_COMPLETION_INDEX"
    fi
    jobs=$(job run "${opt[nodes]}" "$text")
fi
run_with "apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: ${opt[name]}
spec:
  failurePolicy:
    maxRestarts: ${opt[restarts]}
    rules:
    - name: badInput
      action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
$(indented 2 <<<"$jobs")" kubectl apply --filename -
