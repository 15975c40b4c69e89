#!/usr/bin/env bash
# Run wpjax on a Slurm cluster: one program on many GPUs, or an array of independent parts of a sweep.
#
#   slurm.sh [options] -- sweep --base BASE --expert EXPERT --behaviour B --out r.nc --mesh patch=4,model=2
#   slurm.sh --parts 16 --shards /scratch/parts --out r.nc -- sweep --base BASE --expert EXPERT --behaviour B
#
# --dry-run          print the commands instead of running them
# --name NAME        name of the job (wpjax)
# --partition NAME   partition of the cluster
# --account NAME     account that pays
# --nodes N          nodes of one program (1)
# --gpus N           GPUs of a node, or of a part (1)
# --cpus N           processors for each GPU (8)
# --time TIME        how long, at most (12:00:00)
# --setup COMMAND    what to run first, say: source .venv/bin/activate
# --parts N          deal a sweep out in N independent parts, an array of jobs; another job then collects them
# --shards DIR       with --parts: the folder that all parts share
# --out FILE         with --parts: the result
#
# One program has one process a GPU; JAX finds them by what Slurm says. A job that is requeued goes on where it was.
source "$(dirname "$0")/lib.sh"
opt=([name]=wpjax [partition]="" [account]="" [nodes]=1 [gpus]=1 [cpus]=8 [time]=12:00:00 [setup]="" [parts]="" [shards]="" [out]="")
parse "$@"
number nodes gpus cpus parts
plain name partition account time

script() { # the text of a job: $1 and the lines after it are directives, those after -- commands
    echo '#!/bin/bash'
    echo "#SBATCH --job-name=${opt[name]}"
    [[ -z ${opt[partition]} ]] || echo "#SBATCH --partition=${opt[partition]}"
    [[ -z ${opt[account]} ]] || echo "#SBATCH --account=${opt[account]}"
    echo "#SBATCH --time=${opt[time]}"
    while [[ $1 != -- ]]; do
        echo "#SBATCH $1"
        shift
    done
    shift
    echo 'set -euo pipefail'
    [[ -z ${opt[setup]} ]] || echo "${opt[setup]}"
    printf '%s\n' "$@"
}

if ! farmed; then
    run_with "$(script "--nodes=${opt[nodes]}" "--ntasks-per-node=${opt[gpus]}" --gpus-per-task=1 \
        "--cpus-per-task=${opt[cpus]}" --requeue --open-mode=append -- "srun --kill-on-bad-exit=1 $(whole)")" sbatch
    exit
fi
array=$(script "--array=1-${opt[parts]}" "--gpus=${opt[gpus]}" "--cpus-per-task=$((opt[cpus] * opt[gpus]))" --requeue \
    --open-mode=append -- "$(part_of "\$SLURM_ARRAY_TASK_ID")")
# A part that failed holds up the collection: run it again with the same command, and those that are done end at once.
collect=$(script --gpus=1 "--cpus-per-task=${opt[cpus]}" -- "$(collecting)")
if ((dry_run)); then
    # shellcheck disable=SC2016  # what is printed is for the shell that will run it
    printf 'array=$(\n%s\n)\n%s\n' "$(run_with "$array" sbatch --parsable)" \
        "$(run_with "$collect" sbatch --dependency=afterok:ARRAY | sed '1s/ARRAY/"${array%%;*}"/')"
else
    id=$(run_with "$array" sbatch --parsable)
    run_with "$collect" sbatch "--dependency=afterok:${id%%;*}"
fi
