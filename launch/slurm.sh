#!/usr/bin/env bash
# A training as a Slurm job, one process a task. From the top of the checkout, which all nodes have to see, as the
# workdir; `bash launch/setup.sh cuda` makes its .venv once, before:
#
#   sbatch --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 [other options of sbatch] \
#       launch/slurm.sh [--tries 50] -- --config configs/paper.py --workdir /shared/runs/paper ...
#   bash launch/slurm.sh --dry-run -- --config configs/paper.py --workdir /shared/runs/paper ...
#
# The first submits, the second prints what the job would run. Ask for as many tasks a node as it has GPUs: JAX gives
# each task the GPU of its number. The same line again resumes; so does Slurm, by itself: two minutes before the job's
# time is up all tasks get SIGTERM, save and end with status 75, and the job goes back into the queue, --tries times at
# most. A job that Slurm preempts or that loses a node goes back by --requeue. `scancel JOB` ends it, and submitting an
# ended one again is safe: what it finds finished it leaves alone.
#
# What sbatch is asked for unless its command line says otherwise (Slurm 22.05's manual):
#SBATCH --job-name=miracle
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
# Slurm runs a copy of this file from a folder of its own, in the folder from which it was submitted.
checkout=$PWD
if [[ -z "${SLURM_JOB_ID:-}" ]]; then checkout=$(dirname "${BASH_SOURCE[0]}")/..; fi
if [[ ! -f $checkout/launch/setup.sh ]]; then
    echo "error: $checkout is no checkout of miracle_jax; submit from the top of one: sbatch launch/slurm.sh" >&2
    exit 2
fi
source "$checkout/launch/setup.sh"

while [[ $# -gt 0 ]]; do
    case $1 in
        -h | --help) usage ;;
        --tries) tries=$(number "$@"); shift ;;
        --dry-run) dry_run=yes ;;
        --) shift && break ;;
        *) fail "unknown argument $1; what goes to the training follows a --, sbatch's options precede launch/slurm.sh" ;;
    esac
    shift
done
workdir "$@" >/dev/null
[[ -n $dry_run || -n "${SLURM_JOB_ID:-}" ]] || fail "this runs as a job: sbatch launch/slurm.sh ...; see --help"
[[ -n $dry_run || -x .venv/bin/python ]] || fail "there is no .venv yet in $PWD; run bash launch/setup.sh cuda first"
needs srun "it comes with Slurm"

# The batch shell outlives a SIGTERM, to put the job back. Tasks that are left 120 seconds after the first has ended are
# ended; a task that fails is not the end of the others before that, since they have to say why and may have to save.
trap : TERM
status=0
run srun --kill-on-bad-exit=0 --wait=120 .venv/bin/python -m miracle_jax.train "$@" || status=$?
if [[ -n $dry_run ]]; then
    echo "and when that ends with status $PREEMPTED:"
    run scontrol requeue JOB
elif preempted "$status"; then
    restarts=${SLURM_RESTART_COUNT:-0}
    if ((restarts + 1 < tries)); then
        heading "Preempted; back into the queue, restart $((restarts + 1))"
        run scontrol requeue "$SLURM_JOB_ID"
    else
        echo "preempted $((restarts + 1)) times, which is as often as --tries allows; submit the same line to go on" >&2
    fi
fi
exit "$status"
