#!/bin/bash
#SBATCH --job-name=shardmerge
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#
# A merge as a Slurm array, without Ray: many small jobs, none of which needs another.
#
#     launch/array.sh recipe.yml s3://bucket/out 64 [options]
#
# run on a login node, submits this file three times and ends: a job that makes the plan, an array
# of 64 elements that do a slice of it each, and a job that publishes when all are done. Options are
# those of `shardmerge plan`. Preempted, or near its time limit, an element finishes what runs, is
# requeued, and goes on where it was. README.md beside this file has the variables
# (SHARDMERGE, SHARDMERGE_ENV, SHARDMERGE_SBATCH, ...) and what to do when something fails.
set -euo pipefail

say() { echo "[$(date +%T) ${SLURMD_NODENAME:-}] $*"; }

usage="usage: launch/array.sh RECIPE OUT ELEMENTS [options of shardmerge plan]"
most_restarts=${SHARDMERGE_RESTARTS:-50}

# ---- on a login node -----------------------------------------------------------------------------

submit() {
    if (($# < 3)) || ! [[ $3 =~ ^[1-9][0-9]*$ ]]; then
        echo "$usage" >&2
        exit 2
    fi
    local recipe=$1 out=$2 elements=$3 folder file logs most extra=() plan array publish
    shift 3
    recipe=$(realpath -- "$recipe")
    if [[ $out != *://* ]]; then out=$(realpath -m -- "$out"); fi
    # Holds the plan and a log of each element; all nodes must see it.
    folder=$(mktemp -d "$PWD/shardmerge-array-XXXXXX")
    file=$folder/plan
    logs=$folder
    read -ra extra <<<"${SHARDMERGE_SBATCH:-}"
    most=${SHARDMERGE_MOST:-$elements}
    plan=$(sbatch --parsable "${extra[@]}" --output="$logs/plan.log" \
        "$0" --job plan "$file" "$recipe" "$out" "$@")
    plan=${plan%%;*} # on several clusters: number;cluster
    # An element that fails, or a plan, ends those that wait for it; else they would wait for ever.
    array=$(sbatch --parsable "${extra[@]}" --output="$logs/%a.log" \
        --array="0-$((elements - 1))%$most" --dependency="afterok:$plan" --kill-on-invalid-dep=yes \
        "$0" --job worker "$file" "$elements")
    array=${array%%;*}
    publish=$(sbatch --parsable "${extra[@]}" --output="$logs/publish.log" \
        --dependency="afterok:$array" --kill-on-invalid-dep=yes \
        "$0" --job publish "$file")
    publish=${publish%%;*}
    echo "plan: job $plan; $elements elements: array $array; publish: job $publish"
    echo "logs: $folder"
    echo "look: squeue --jobs=$plan,$array,$publish    stop: scancel $plan $array $publish"
}

# ---- in a job ------------------------------------------------------------------------------------

# step COMMAND...: run it; a notice of Slurm's makes it finish what runs and end with 3.
step() {
    local child="" told="" code
    trap 'told=yes; kill -USR1 "$child" 2>/dev/null || true' USR1 TERM
    "$@" &
    child=$!
    while :; do
        code=0
        told=""
        wait "$child" || code=$?
        # A signal ends the wait, not the command; the next wait has its true status.
        if [[ -z $told ]]; then break; fi
    done
    trap '' USR1 TERM
    if ((code == 3)); then again; fi
    if ((code != 0)); then
        say "ended with $code"
        exit "$code"
    fi
}

# Ask Slurm to run this job, or this element, again; it goes on where it was.
again() {
    local restarts=${SLURM_RESTART_COUNT:-0}
    # Who cancelled the job, or let its time run out, does not want it back.
    if [[ $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) != RUNNING ]] ||
        ((restarts >= most_restarts)); then
        say "not requeued after $restarts restarts; the same array.sh command goes on from here"
        exit 3
    fi
    say "requeued: it stopped and can be resumed"
    scontrol requeue "$SLURM_JOB_ID" || exit 3
    exit 85
}

# What this job may use, less what the system and the interpreter may take; unless options say so.
memory_option() {
    local option total
    for option in "$@"; do
        if [[ $option == --memory || $option == --memory=* ]]; then return; fi
    done
    total=${SLURM_MEM_PER_NODE:-$((${SLURM_MEM_PER_CPU:-0} * SLURM_CPUS_ON_NODE))}
    if ((total > 0)); then echo "--memory=$((total * 8 / 10))MiB"; fi
}

job() {
    local part=$1 file=$2 shardmerge memory
    shift 2
    if [[ -n ${SHARDMERGE_ENV:-} ]]; then
        # Modules and virtual environments are not written for strict shells.
        set +eu
        # shellcheck disable=SC1090
        source "$SHARDMERGE_ENV"
        set -eu
    fi
    read -ra shardmerge <<<"${SHARDMERGE:-shardmerge}"
    say "$part on $(hostname), restarts: ${SLURM_RESTART_COUNT:-0}"
    case $part in
        plan)
            memory=$(memory_option "$@")
            step "${shardmerge[@]}" plan "$@" ${memory:+"$memory"} --save "$file"
            ;;
        worker)
            step "${shardmerge[@]}" worker --plan "$file" --slice "$SLURM_ARRAY_TASK_ID/$1"
            ;;
        publish)
            step "${shardmerge[@]}" publish --plan "$file"
            ;;
    esac
}

if [[ ${1:-} == --job ]]; then
    shift
    job "$@"
else
    submit "$@"
fi
