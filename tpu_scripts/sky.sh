#!/usr/bin/env bash
# Run wpjax with SkyPilot: on a TPU slice, on GPUs of several machines, or as managed jobs on spot machines.
#
#   sky.sh --accelerator tpu-v5litepod-16 -- sweep --base BASE --expert EXPERT --behaviour B --out r.nc
#   sky.sh --accelerator H100:8 --nodes 2 -- sweep ... --mesh model=8
#   sky.sh --accelerator tpu-v6e-8 --spot yes --bucket gs://MINE -- sweep ... --out /results/r.nc
#   sky.sh --accelerator L4:1 --spot yes --bucket s3://MINE --parts 8 --shards /results/parts --out /results/r.nc -- sweep ...
#
# --dry-run            print the commands and the YAML instead of running them
# --name NAME          name of the cluster or the job (wpjax)
# --accelerator NAME   as SkyPilot names it: tpu-v5litepod-N and tpu-v6e-N (N chips), H100:8
# --nodes N            machines (1). A TPU slice of several hosts counts as one
# --spot yes|no        a managed job on spot machines: it begins anew elsewhere when it loses them, and goes on (no)
# --bucket URL         a bucket, mounted as /results: what has to outlive the machines, so --spot needs it
# --region NAME        region of the cloud
# --parts N            with --spot yes: deal a sweep out in N independent jobs
# --shards DIR         with --parts: the folder that all parts share, below /results
# --out FILE           with --parts: the result, below /results
#
# Run it in the folder of wpjax: the machines get a copy of it, and install it. HF_TOKEN, if you have set it, goes with
# it, so that gated models can be fetched.
source "$(dirname "$0")/lib.sh"
opt=([name]=wpjax [accelerator]="" [nodes]=1 [spot]=no [bucket]="" [region]="" [parts]="" [shards]="" [out]="")
parse "$@"
need accelerator
number nodes parts
plain name accelerator bucket region
[[ ${opt[spot]} =~ ^(yes|no)$ ]] || fail "--spot is yes or no"
[[ ${opt[spot]} == no || -n ${opt[bucket]} ]] || fail "--spot yes needs --bucket: without it all work is lost with the machine"
[[ -z ${opt[parts]} || ${opt[spot]} == yes ]] || fail "--parts needs --spot yes: the parts are managed jobs"
if [[ ${opt[spot]} == yes ]]; then
    kept=${opt[shards]}${opt[out]:-$(out_of)}
    [[ $kept == /results/* ]] || fail "--out and --shards must lie below /results, or they are lost with the machine"
fi
extra=cuda
[[ ${opt[accelerator]} != tpu-* ]] || extra=tpu

task() { # the YAML of a task that runs the command $1
    echo "name: ${opt[name]}"
    echo "num_nodes: ${opt[nodes]}"
    echo 'resources:'
    echo "  accelerators: ${opt[accelerator]}"
    [[ $extra == cuda ]] || echo "  accelerator_args:
    runtime_version: $(runtime)"
    [[ -z ${opt[region]} ]] || echo "  region: ${opt[region]}"
    [[ ${opt[spot]} == no ]] || echo '  use_spot: true'
    echo 'workdir: .'
    [[ -z ${opt[bucket]} ]] || echo "file_mounts:
  /results:
    source: ${opt[bucket]}
    mode: MOUNT
envs:
  JAX_COMPILATION_CACHE_DIR: /results/compiled"
    echo "setup: |
  pip install -e '.[$extra]' -c requirements.lock"
    echo "run: |"
    indented 2 <<<"$1"
}

runtime() { # the software of a TPU's machines
    case ${opt[accelerator]} in
    tpu-v6e-*) echo v2-alpha-tpuv6e ;;
    tpu-v5p-*) echo v2-alpha-tpuv5 ;;
    *) echo v2-alpha-tpuv5-lite ;;
    esac
}

secrets=()
[[ -z ${HF_TOKEN:-} ]] || secrets=(--secret HF_TOKEN)

launch() { # a task $2 under the name $1
    local yaml
    if ((dry_run)); then
        yaml=$1.yaml
        run_with "$2" tee "$yaml"
    else
        yaml=$(mktemp --suffix=.yaml)
        echo "$2" >"$yaml"
    fi
    if [[ ${opt[spot]} == yes ]]; then
        run sky jobs launch --name "$1" "${secrets[@]}" --yes --detach-run "$yaml"
    else
        run sky launch --cluster "$1" "${secrets[@]}" --yes "$yaml"
    fi
}

if ! farmed; then
    text=$(whole)
    # The machines of a TPU slice find one another. Others are told where the first one is.
    if ((opt[nodes] > 1)) && [[ $extra == cuda ]]; then
        # shellcheck disable=SC2016  # these are words of the shell on the machines
        text+=' --coordinator "$(head -n 1 <<< "$SKYPILOT_NODE_IPS"):12355" --num-processes "$SKYPILOT_NUM_NODES"'
        # shellcheck disable=SC2016
        text+=' --process-id "$SKYPILOT_NODE_RANK"'
    fi
    launch "${opt[name]}" "$(task "$text")"
    exit
fi
for ((i = 1; i <= opt[parts]; i++)); do
    launch "${opt[name]}-$i" "$(task "$(part_of "$i")")"
done
echo "# when all have ended, where the bucket is mounted: $(collecting)"
