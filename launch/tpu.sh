#!/usr/bin/env bash
# A training on a Cloud TPU: one TPU VM or all the workers of a slice, the same script for both. From a machine that
# stays up (in tmux, say), with gcloud signed in and, for a slice, its key in the agent:
# ssh-add ~/.ssh/google_compute_engine
#
#   bash launch/tpu.sh run NAME --zone ZONE --type v5litepod-16 (--nfs HOST:/SHARE | --disk DISK) [--spot] [flags] \
#       -- --config configs/paper.py --workdir /mnt/miracle/runs/paper ...
#   bash launch/tpu.sh create|install NAME --zone ZONE --type v5litepod-16 (--nfs HOST:/SHARE | --disk DISK) [--spot]
#   bash launch/tpu.sh status|stop|delete NAME --zone ZONE
#
# `run` does all there is to do and nothing twice: it asks for the TPU where there is none and waits until it is there,
# copies HEAD to all workers, installs what changed, and starts the same `python -m miracle_jax.train` on all of them.
# The same line again resumes, and where the training still runs (this script was interrupted, or the connection broke)
# it shows it again. A spot TPU that is taken away is asked for anew and the training resumed on it, --tries times at
# most; so is a training that ends with status 75 ("preempted, run me again"). Other failures end the script.
# `create` and `install` are its first two steps; `stop` has the training save and end; `delete` ends the TPU and what it
# costs, and keeps the disk.
#
#   --nfs HOST:/SHARE     a shared file system (Filestore, for instance) for the workdir, mounted at /mnt/miracle on all
#                         workers; a slice needs one, since all of its workers write into the run's folder
#   --disk DISK           for one VM: a persistent disk of that name, made (100 GB) and formatted where it is new
#   --spot                cheaper capacity that can be taken away at any time
#   --runtime VERSION     the TPU VM's image; the default is that of the --type
#   --project PROJECT     where it is not gcloud's own
#   --tries 50            how often to start the training at most
#   --dry-run             print each command, for a TPU that is not there yet, and run none
#
# Nothing on the TPU's own disk outlives a preemption: --workdir has to be below /mnt/miracle, where compiled programs
# are kept too. Follows gcloud 528 (`gcloud compute tpus queued-resources|tpu-vm ... --help`) and
# https://cloud.google.com/tpu/docs/queued-resources: TPUs are asked for through the queue, spot ones and others.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

MOUNT=/mnt/miracle
PAUSE=30 # seconds between two looks at a state

ON_WORKER="cd miracle_jax && bash launch/worker.sh"

command=${1:-} name=${2:-} zone="" type="" nfs="" disk="" spot="" runtime="" project=""
case $command in
    -h | --help | "") usage ;;
    run | create | install | status | stop | delete) ;;
    *) fail "unknown command $command; tpu.sh takes run, create, install, status, stop or delete, and --help" ;;
esac
if [[ $name == -h || $name == --help ]]; then usage; fi
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] ||
    fail "$command needs a name of small letters, digits and hyphens: bash launch/tpu.sh $command NAME --zone ZONE ..."
shift 2
while [[ $# -gt 0 ]]; do
    case $1 in
        -h | --help) usage ;;
        --zone) zone=$(value "$@"); shift ;;
        --type) type=$(value "$@"); shift ;;
        --nfs) nfs=$(value "$@"); shift ;;
        --disk) disk=$(value "$@"); shift ;;
        --runtime) runtime=$(value "$@"); shift ;;
        --project) project=$(value "$@"); shift ;;
        --tries) tries=$(number "$@"); shift ;;
        --spot) spot=yes ;;
        --dry-run) dry_run=yes ;;
        --) shift && break ;;
        *) fail "unknown argument $1; what goes to the training follows a --" ;;
    esac
    shift
done
[[ -n $zone ]] || fail "$command needs --zone, for instance --zone us-west4-a"
[[ $command == run || $# -eq 0 ]] || fail "only run trains; $command takes nothing after --"
needs gcloud "https://cloud.google.com/sdk/docs/install says how"
where=("--zone=$zone" ${project:+"--project=$project"})
found=("${where[@]}" "--filter=name~/$name\$") # of a list: one that is empty is no error

if [[ $command == run || $command == create || $command == install ]]; then
    [[ -n $type ]] || fail "$command needs --type, for instance --type v5litepod-8"
    [[ -n $nfs || -n $disk ]] ||
        fail "$command needs a disk that outlives the TPU: --nfs HOST:/SHARE, or --disk DISK for one VM"
    [[ -z $nfs || -z $disk ]] || fail "give --nfs or --disk, not both"
    [[ -z $nfs || $nfs == *:/* ]] || fail "--nfs takes HOST:/SHARE, not $nfs"
    case ${runtime:-$type} in # https://cloud.google.com/tpu/docs/runtimes
        v6e-*) runtime=v2-alpha-tpuv6e ;;
        v5p-*) runtime=v2-alpha-tpuv5 ;;
        v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
        v2-[0-9]* | v3-[0-9]* | v4-*) runtime=tpu-ubuntu2204-base ;;
        *) [[ -n $runtime ]] || fail "which image a $type takes is not known here; name it with --runtime" ;;
    esac
fi
if [[ $command == run ]]; then
    folder=$(workdir "$@")
    [[ $folder == $MOUNT/?* ]] || fail "--workdir $folder would be lost with the TPU; it has to be below $MOUNT"
fi

queue() { run gcloud compute tpus queued-resources "$1" "$name" "${where[@]}" "${@:2}"; }

state() { # of the request for the TPU, or once it is filled of the TPU; empty where there is neither
    local state
    state=$(run gcloud compute tpus queued-resources list "${found[@]}" "--format=value(state.state)") || return
    if [[ $state == ACTIVE || -n $dry_run ]]; then
        state=$(run gcloud compute tpus tpu-vm list "${found[@]}" "--format=value(state)") || return
        if [[ -z $state && -z $dry_run ]]; then state=GONE; fi
    fi
    echo "$state"
}

request() {
    local disk_flag=""
    if [[ -n $disk ]]; then
        make_disk || return
        if [[ -z $project ]]; then project=$(run gcloud config get-value project) || return; fi
        [[ -n $project || -n $dry_run ]] || fail "which project the disk is in is not known; give --project"
        disk_flag=--data-disk=source=projects/${project:-PROJECT}/zones/$zone/disks/$disk,mode=read-write
    fi
    queue create "--node-id=$name" "--accelerator-type=$type" "--runtime-version=$runtime" \
        ${disk_flag:+"$disk_flag"} ${spot:+--spot}
}

make_disk() {
    local kind=pd-balanced there
    if [[ $type == v6e-* ]]; then kind=hyperdisk-balanced; fi # v6e takes no persistent disks
    there=$(run gcloud compute disks list "--zones=$zone" "${where[@]:1}" "--filter=name=$disk" "--format=value(name)") ||
        return
    [[ -n $there ]] || run gcloud compute disks create "$disk" "${where[@]}" --size=100GB "--type=$kind"
}

delete() { # --force: with the TPU in it
    queue delete --force --quiet
}

create() { # leaves the TPU ready; a request that waits for capacity keeps its place in the queue
    local state said=""
    heading "TPU $name ($type${spot:+, spot})"
    while :; do
        state=$(state) || fail "gcloud could not say whether $name is there; its reason is above"
        case $state in
            "") request || fail "gcloud could not ask for $name; its reason is above" ;;
            READY) return ;;
            PREEMPTED | TERMINATED | SUSPENDED | GONE)
                heading "$name is $state; asking for another"
                delete || fail "gcloud could not delete what is left of $name; its reason is above"
                ;;
            FAILED | STOPPED | HIDDEN)
                fail "$name is $state; \`gcloud compute tpus queued-resources describe $name ${where[*]}\` says why, \
\`bash launch/tpu.sh delete $name --zone $zone\` gives it up"
                ;;
            *)
                if [[ $state != "$said" ]]; then heading "$name is $state; waiting until it is ready"; fi
                said=$state
                sleep $PAUSE
                ;;
        esac
        if [[ -n $dry_run ]]; then return; fi
    done
}

on_all() { # a command line for the shell of all workers; ends with the status of one that failed, if one did
    run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all "--command=$1"
}

install() {
    local archive
    heading "Installing on all workers"
    needs git "the workers get the files of its HEAD"
    if [[ -z $dry_run && -n $(git status --porcelain --untracked-files=no) ]]; then
        echo "warning: uncommitted changes stay here; the workers get HEAD" >&2
    fi
    archive=${TMPDIR:-/tmp}/miracle_jax-$name.tar.gz
    run git archive --format=tar.gz "--output=$archive" HEAD || return
    run gcloud compute tpus tpu-vm scp "$archive" "$name:miracle_jax.tar.gz" "${where[@]}" --worker=all || return
    on_all "mkdir -p miracle_jax && tar -xzf miracle_jax.tar.gz -C miracle_jax && \
$ON_WORKER prepare${nfs:+ --share $(quoted "$nfs")}"
}

train() { # one try: the status of the training, or 75 where it was the TPU that failed
    local status=0 state
    create
    install || status=$?
    if [[ $status == 0 ]]; then
        heading "Training on all workers"
        on_all "export JAX_COMPILATION_CACHE_DIR=$MOUNT/compiled && $ON_WORKER start -- $(quoted "$@")" || status=$?
    fi
    if [[ $status == 0 || $status == 130 ]] || preempted "$status"; then return "$status"; fi
    sleep $PAUSE # until what happened to the TPU has reached its state
    state=$(state) || return "$status"
    # With 255 it was the connection, and how the training is doing is not known.
    if [[ $state == READY && $status != 255 ]]; then return "$status"; fi
    heading "$name is ${state:-gone} (status $status)"
    return "$PREEMPTED"
}

case $command in
    create) create ;;
    install) install ;;
    run)
        again train "$@"
        [[ -n $dry_run ]] || heading "Done: $folder. The TPU costs until: bash launch/tpu.sh delete $name --zone $zone"
        ;;
    status)
        state=$(state)
        echo "$name is ${state:-not there}"
        ;;
    stop) on_all "$ON_WORKER stop" ;;
    delete)
        state=$(state)
        if [[ -z $state && -z $dry_run ]]; then
            echo "$name is not there"
        else
            delete
        fi
        ;;
esac
