#!/usr/bin/env bash
# Run wpjax on a Cloud TPU that is queued for, and fetch what it wrote.
#
#   gcloud.sh --zone us-west4-a --accelerator v5litepod-16 -- sweep --base BASE --expert EXPERT --behaviour B --out r.nc
#   gcloud.sh --zone us-west4-a --accelerator v5litepod-8 --project MINE --spot yes -- sweep ...
#
# --dry-run            print the commands instead of running them
# --name NAME          name of the TPU (wpjax)
# --zone ZONE          where
# --project NAME       whose (that of gcloud's configuration)
# --accelerator NAME   v5litepod-N and v6e-N have N chips; v5p-N and v4-N count cores, two a chip
# --version NAME       software of its machines (that of the accelerator)
# --spot yes|no        a TPU that may be taken away (no)
# --keep yes|no        leave the TPU when the command has ended; no deletes it, and what was not fetched with it (no)
#
# Run it in the folder of wpjax: the machines get a copy of it, and install it. Files that the command names are looked
# up in that folder. All machines of a slice run the same command, and JAX finds them; the first one writes the output.
source "$(dirname "$0")/lib.sh"
opt=([name]=wpjax [zone]="" [project]="" [accelerator]="" [version]="" [spot]=no [keep]=no)
parse "$@"
need zone accelerator
plain name zone project accelerator version
[[ ${opt[spot]}${opt[keep]} =~ ^(yes|no)(yes|no)$ ]] || fail "--spot and --keep are yes or no"
if [[ -z ${opt[version]} ]]; then
    case ${opt[accelerator]} in
    v6e-*) opt[version]=v2-alpha-tpuv6e ;;
    v5p-*) opt[version]=v2-alpha-tpuv5 ;;
    v5litepod-*) opt[version]=v2-alpha-tpuv5-lite ;;
    v4-*) opt[version]=tpu-ubuntu2204-base ;;
    *) fail "--accelerator ${opt[accelerator]} is none of v4-N, v5litepod-N, v5p-N, v6e-N; for another, name its --version" ;;
    esac
fi
where=(--zone "${opt[zone]}")
[[ -z ${opt[project]} ]] || where+=(--project "${opt[project]}")
tpus=(gcloud compute tpus)

create=("${tpus[@]}" queued-resources create "${opt[name]}" --node-id "${opt[name]}" "${where[@]}"
    --accelerator-type "${opt[accelerator]}" --runtime-version "${opt[version]}")
[[ ${opt[spot]} == no ]] || create+=(--spot)
describe=("${tpus[@]}" queued-resources describe "${opt[name]}" "${where[@]}" '--format=value(state.state)')
ssh=("${tpus[@]}" tpu-vm ssh "${opt[name]}" "${where[@]}" --worker=all)

delete=("${tpus[@]}" queued-resources delete "${opt[name]}" "${where[@]}" --force --quiet)

trap 'echo "the TPU is still there, and costs: $(quoted "${delete[@]}")" >&2' ERR
run "${create[@]}"
if ((dry_run)); then
    echo "until [ \"\$($(quoted "${describe[@]}"))\" = ACTIVE ]; do sleep 30; done"
else
    until state=$("${describe[@]}") && [[ $state == ACTIVE ]]; do
        [[ $state != FAILED && $state != SUSPENDED ]] || fail "the TPU ${opt[name]} is $state: $(quoted "${delete[@]}")"
        sleep 30
    done
fi
run "${tpus[@]}" tpu-vm scp --recurse . "${opt[name]}:wpjax" "${where[@]}" --worker=all
run "${ssh[@]}" --command "cd wpjax && python3 -m pip install -e '.[tpu]' -c requirements.lock"
run "${ssh[@]}" --command "cd wpjax && $(whole)"
out=$(out_of)
there=$out
[[ $out == /* ]] || there=wpjax/$out
[[ -z $out ]] || run "${tpus[@]}" tpu-vm scp --recurse "${opt[name]}:$there" "$out" "${where[@]}" --worker=0
[[ ${opt[keep]} == yes ]] || run "${delete[@]}"
