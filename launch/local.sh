#!/usr/bin/env bash
# Trains with several processes on this machine, as a cluster would: a rehearsal of one, or one process a GPU.
#
#   bash launch/local.sh [--processes 2] [--tries 50] [--dry-run] -- --config configs/tiny.py --workdir runs/two ...
#
# What follows `--` goes to `python -m miracle_jax.train`, with paths from the top of the checkout. The same line again
# resumes. A process that is told to stop (SIGTERM) makes all of them save and end with status 75, and they are started
# again, --tries times at most. Ctrl-C or SIGTERM to this script has them save and ends it with that status; a second
# one ends them at once. When one fails, the others have 90 seconds to say so and end; then they are killed.
#
# Process 0 prints as usual, the others with their number before each line. The coordinator listens on 127.0.0.1 only.
# Process I sees GPU I and no other; without GPUs all of them share the processor.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

processes=2
while [[ $# -gt 0 ]]; do
    case $1 in
        -h | --help) usage ;;
        --processes) processes=$(number "$@"); shift ;;
        --tries) tries=$(number "$@"); shift ;;
        --dry-run) dry_run=yes ;;
        --) shift && break ;;
        *) fail "unknown argument $1; what goes to the training follows a --" ;;
    esac
    shift
done
folder=$(workdir "$@")
[[ -n $dry_run || -x .venv/bin/python ]] || fail "there is no .venv yet; run bash launch/setup.sh first"

pids=() stopping="" told=0

stop() { # once: they save and end; twice: at once
    stopping=yes told=${#pids[@]}
    kill -TERM "${pids[@]}" 2>/dev/null || true
}

free_port() {
    local port
    while port=$((20000 + RANDOM % 10000)) && (: >"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do :; done
    echo "$port"
}

train() { # starts all processes and waits; the status of the first that failed by itself, else 75 if any did not finish
    local address i pid status result=0 deadline="" command
    if [[ -n $stopping ]]; then exit "$PREEMPTED"; fi
    address=127.0.0.1:$(free_port) pids=()
    for ((i = 0; i < processes; i++)); do
        command=(env "CUDA_VISIBLE_DEVICES=$i" .venv/bin/python -m miracle_jax.train "$@"
            --coordinator "$address" --processes "$processes" --process "$i")
        echo "+ $(quoted "${command[@]}")"
        [[ -z $dry_run ]] || continue
        if ((i == 0)); then
            "${command[@]}" 3>&- &
        else
            "${command[@]}" > >(sed -u "s/^/[$i] /") 2> >(sed -u "s/^/[$i] /" >&2) &
        fi
        pids+=($!)
    done
    # One that was being started when the others were told to stop.
    if [[ -n $stopping ]]; then kill -TERM "${pids[@]:told}" 2>/dev/null || true; fi
    local left=(${pids[@]+"${pids[@]}"})
    while [[ ${#left[@]} -gt 0 ]]; do
        for i in "${!left[@]}"; do
            pid=${left[i]}
            if kill -0 "$pid" 2>/dev/null; then continue; fi
            status=0
            wait "$pid" || status=$?
            unset "left[i]"
            # Behind a preempted one the others end because it is gone, or are ended below.
            case $status in
                0) ;;
                134 | 137) if [[ $result == 0 ]]; then result=$status; fi ;;
                *) if [[ $result == 0 ]] || preempted "$result"; then result=$status; fi ;;
            esac
        done
        if [[ $result != 0 && -z $deadline ]]; then deadline=$((SECONDS + 90)); fi
        if [[ -n $deadline && $SECONDS -gt $deadline ]]; then kill -KILL "${left[@]}" 2>/dev/null || true; fi
        sleep 0.2 || true
    done
    # Preempted, and this script with it: whoever told it to stop starts it again.
    if [[ -n $stopping ]] && preempted "$result"; then exit "$PREEMPTED"; fi
    return "$result"
}

trap stop TERM INT HUP
again train "$@"
[[ -n $dry_run ]] || heading "Done: $folder"
