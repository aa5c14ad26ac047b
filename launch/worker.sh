#!/usr/bin/env bash
# What tpu.sh runs on each worker of a TPU; `start` and `stop` serve any machine that one reaches by ssh.
#
#   bash launch/worker.sh prepare [--share HOST:/SHARE] [--dry-run]
#   bash launch/worker.sh start [--dry-run] -- --config configs/paper.py --workdir /mnt/miracle/runs/paper ...
#   bash launch/worker.sh stop [--dry-run]
#
# `prepare` mounts the share, or without one the machine's second disk, at /mnt/miracle and makes .venv for TPUs; it
# needs sudo. `start` starts the training and shows what it prints (kept in runs/worker/log) until it ends, with its
# exit status. When the connection breaks the training goes on; the same line again shows it again, and where it has
# ended resumes it. `stop` has it save and end, and the `start` that shows it ends with status 130; twice, it ends at
# once.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

MOUNT=/mnt/miracle
KEPT=runs/worker    # what is known of the training
LOCK=$KEPT/training # its process group and arguments; locked by all its processes as long as there are any

second_disk() { # one without partitions that is not mounted, so not the system's
    local disk
    for disk in $(lsblk --nodeps --noheadings --paths --output NAME --exclude 7); do # 7: not the images of snaps
        if [[ $(lsblk --noheadings --raw --output NAME,MOUNTPOINT "$disk") =~ ^[^[:space:]]+\ *$ ]]; then
            echo "$disk"
            return
        fi
    done
    fail "there is no second disk to mount at $MOUNT, and no --share was given"
}

mount_disk() {
    local disk
    if [[ -z $dry_run ]] && mountpoint --quiet $MOUNT; then return; fi
    heading "Mounting $MOUNT"
    run sudo mkdir -p $MOUNT
    if [[ -n $share ]]; then
        run sudo apt-get -qq -o DPkg::Lock::Timeout=600 update # a new machine upgrades itself and holds the lock
        run sudo apt-get -qq -o DPkg::Lock::Timeout=600 install -y nfs-common
        # NFS 3 keeps the lock of a machine that is gone for ever, so of a run's folder it is one among the machine's own.
        run sudo mount -t nfs -o vers=3,hard,local_lock=flock "$share" $MOUNT
    else
        if [[ -n $dry_run ]]; then disk=DISK; else disk=$(second_disk); fi
        if ! run sudo blkid "$disk" || [[ -n $dry_run ]]; then run sudo mkfs.ext4 -q "$disk"; fi # it has no file system yet
        run sudo mount "$disk" $MOUNT
    fi
    # Of a new disk or share that only root may write, all may write from then on.
    [[ -w $MOUNT ]] || run sudo chmod a+rwxt $MOUNT
}

# The images of TPU VMs have Ubuntu 22.04's Python 3.10, which is too old; uv brings one.
prepare() {
    mount_disk
    heading "Python"
    run python3 -m pip install -qq --user uv
    run ~/.local/bin/uv python install -q 3.12
    PYTHON=$(run ~/.local/bin/uv python find --system 3.12)
    run bash launch/setup.sh "PYTHON=${PYTHON:-python3.12}" tpu
}

start() {
    local arguments group others
    arguments=$(quoted "$@")
    if [[ -n $dry_run ]]; then
        run .venv/bin/python -m miracle_jax.train "$@"
        return
    fi
    [[ -x .venv/bin/python ]] || fail "there is no .venv yet in $PWD; run bash launch/setup.sh tpu first"
    mkdir -p $KEPT
    exec 9>>$LOCK
    if flock --nonblock 9; then
        rm -f $KEPT/status $KEPT/stopped
        : >$KEPT/log
        # The shell around it outlives a SIGTERM to the group, to note how the training ended.
        setsid bash -c 'trap : TERM; status=0; "${@:2}" >"$1/log" 2>&1 || status=$?; echo $status >"$1/status"' \
            worker $KEPT .venv/bin/python -m miracle_jax.train "$@" </dev/null >/dev/null 2>&1 3>&- &
        group=$!
        printf '%s\n' "$group" "$arguments" >$LOCK
    else
        { read -r group && read -r others; } <$LOCK || fail "another training starts in $PWD; try again"
        [[ $others == "$arguments" ]] ||
            fail "another training runs in $PWD ($others); bash launch/worker.sh stop ends it"
        heading "Following the training that runs already"
    fi
    exec 9>&-
    tail --lines=+1 --follow --sleep-interval=0.5 "--pid=$group" $KEPT/log
    [[ -e $KEPT/status ]] || fail "the training was killed with all that belongs to it; the same line resumes it"
    if [[ -e $KEPT/stopped ]]; then
        echo "stopped; the same line resumes it" >&2
        exit 130
    fi
    exit "$(<$KEPT/status)"
}

stop() {
    local group
    if [[ -n $dry_run ]]; then
        run kill -TERM -- -GROUP
    elif [[ ! -e $LOCK ]] || flock --nonblock $LOCK true; then
        echo "no training runs in $PWD"
    else
        read -r group <$LOCK
        touch $KEPT/stopped
        run kill -TERM -- "-$group"
        echo "told to save and end"
    fi
}

command=${1:-} share=""
case $command in
    prepare | start | stop) shift ;;
    -h | --help | "") usage ;;
    *) fail "unknown command $command; worker.sh takes prepare, start or stop, and --help" ;;
esac
while [[ $# -gt 0 ]]; do
    case $1 in
        -h | --help) usage ;;
        --share) share=$(value "$@"); shift ;;
        --dry-run) dry_run=yes ;;
        --) shift && break ;;
        *) fail "unknown argument $1; what goes to the training follows a --" ;;
    esac
    shift
done
if [[ $command == start ]]; then workdir "$@" >/dev/null; fi
"$command" "$@"
