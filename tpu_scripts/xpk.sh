#!/usr/bin/env bash
# Run wpjax on TPU slices of a GKE cluster, by XPK.
#
#   xpk.sh --cluster MINE --zone us-west4-a --tpu v5litepod-16 --image IMAGE -- sweep ... --out /results/r.nc
#
# --dry-run         print the command instead of running it
# --name NAME       name of the workload (wpjax)
# --cluster NAME    the cluster, made by xpk cluster create
# --zone ZONE       where
# --project NAME    whose (that of gcloud's configuration)
# --tpu NAME        v5litepod-N and v6e-N have N chips; v5p-N and v4-N count cores, two a chip
# --slices N        slices (1)
# --image IMAGE     the Dockerfile beside these scripts, built with --build-arg DEVICE=tpu and pushed
# --storage NAME    what xpk storage attach has attached; --out must lie below its mount point
# --restarts N      how often it may begin again when it loses its machines (3). It goes on where it was
#
# XPK begins again on exit codes 42 and 127 to 255, so not on bad input, which is 2.
source "$(dirname "$0")/lib.sh"
opt=([name]=wpjax [cluster]="" [zone]="" [project]="" [tpu]="" [slices]=1 [image]="" [storage]="" [restarts]=3)
parse "$@"
need cluster zone tpu image
number slices restarts
create=(xpk workload create --workload "${opt[name]}" --cluster "${opt[cluster]}" --zone "${opt[zone]}"
    "--tpu-type=${opt[tpu]}" "--num-slices=${opt[slices]}" --docker-image "${opt[image]}"
    "--max-restarts=${opt[restarts]}" --command "$(whole)")
[[ -z ${opt[storage]} ]] || create+=(--storage "${opt[storage]}")
[[ -z ${opt[project]} ]] || create+=(--project "${opt[project]}")
run "${create[@]}"
