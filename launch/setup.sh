#!/usr/bin/env bash
# Makes the environment that all other scripts use: .venv at the top of the checkout, with the package in it. On its own
# it adds extras named in pyproject.toml, for instance `bash launch/setup.sh cuda`.
#
#   bash launch/setup.sh [PYTHON=python3.12] [EXTRA ...]
#
# A later run installs only when something changed; deleting .venv starts afresh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# XLA asks for its scratch memory anew at every step, and on Linux the kernel clears it page by page. By huge pages, which
# glibc asks for with this, a training step on a CPU takes an eighth to a quarter less (benchmarks/README.md).
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}

heading() { printf '\n== %s  [%d:%02d]\n' "$1" $((SECONDS / 60)) $((SECONDS % 60)); }

fail() {
    echo "error: $1" >&2
    exit 2
}

usage() { # the comment at the top of the script that was started
    sed -n '2,/^set/s/^# \{0,1\}//p' "launch/$(basename "$0")"
    exit 0
}

# ---- What local.sh, slurm.sh, tpu.sh and gke.sh share

PREEMPTED=75 # exit status of a training that was told to stop and saved its state: the same command goes on from there
dry_run="" tries=50

preempted() { # whether an exit status says so; 143: told to stop before it could listen, or twice
    [[ $1 == "$PREEMPTED" || $1 == 143 ]]
}

quoted() { # the words as one line that any shell reads back as the same words
    local word line="" quote="'\\''"
    for word in "$@"; do
        [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word="'${word//\'/$quote}'"
        line+=" $word"
    done
    echo "${line:1}"
}

exec 3>&1
run() { # prints a command, past a $(...) or a pipe around it, and runs it unless this is a dry run
    echo "+ $(quoted "$@")" >&3
    [[ -n $dry_run ]] || "$@" 3>&-
}

needs() { # needs TOOL REMEDY: of a dry run nothing is needed
    [[ -n $dry_run ]] || command -v "$1" >/dev/null || fail "$1 is not installed; $2"
}

value() { # value FLAG [VALUE ...]: the value that a flag of the command line has to have
    [[ $# -ge 2 && -n $2 && $2 != --* ]] || fail "$1 needs a value; --help shows it"
    echo "$2"
}

number() { # as value, for a whole number from 1
    [[ "${2:-}" =~ ^[1-9][0-9]*$ ]] || fail "$1 takes a whole number from 1 on, not '${2:-}'"
    echo "$2"
}

workdir() { # the --workdir among the arguments of a training, which has to have one
    local found=""
    while [[ $# -gt 0 ]]; do
        case $1 in
            --workdir) found=${2:-} ;;
            --workdir=*) found=${1#*=} ;;
        esac
        shift
    done
    [[ -n $found ]] || fail "the training needs a --workdir, in which the same line finds it again and resumes"
    echo "$found"
}

again() { # again COMMAND ...: as often as it ends as preempted, $tries times at most; its exit status
    local try status
    for ((try = 1; ; try++)); do
        status=0
        "$@" || status=$?
        preempted "$status" || return "$status"
        if ((try >= tries)); then
            echo "preempted $try times, which is as often as --tries allows; the same line goes on from there" >&2
            return "$PREEMPTED"
        fi
        heading "Preempted; resuming, try $((try + 1)) of $tries"
    done
}

# ---- The environment

suitable() { "$1" -c "import sys, $2; sys.exit(sys.version_info < (3, 11))" 2>/dev/null; }

find_python() {
    local candidates=(python3.11 python3.12 python3.13 python3) candidate version
    if [[ -n "${PYTHON:-}" ]]; then candidates=("$PYTHON"); fi
    for candidate in "${candidates[@]}"; do
        # Some systems split ensurepip, which puts pip into a new environment, from Python itself.
        if suitable "$candidate" ensurepip; then
            echo "$candidate"
            return
        fi
    done
    version=$("$candidate" --version 2>/dev/null) || version="not there"
    fail "miracle_jax needs Python 3.11 or newer with venv, but $candidate is $version; install one \
(apt install python3 python3-venv, brew install python@3.12, or https://www.python.org) or name it: PYTHON=/path/to/python3.12"
}

# set_up EXTRA...: leaves .venv with the package and these extras installed.
set_up() {
    local python=.venv/bin/python package=. base state extra extras missing=""
    extras=$(sed -n '/^\[project.optional-dependencies\]/,/^$/s/ = .*//p' pyproject.toml | tr '\n' ' ')
    for extra in "$@"; do
        [[ " $extras" == *" $extra "* ]] || fail "unknown extra $extra; pyproject.toml has: $extras"
        package=".[$(IFS=, && echo "$*")]"
    done
    if ! suitable $python pip || [[ -n "${PYTHON:-}" && "$("$PYTHON" --version 2>&1)" != "$($python --version)" ]]; then
        base=$(find_python)
        heading "Making .venv with $("$base" --version)"
        "$base" -m venv --clear .venv || fail "$base could not make the virtual environment .venv; the reason is above"
    fi
    state=$({ pwd && cat pyproject.toml; } | cksum)
    for extra in base "$@"; do
        grep -qsx "$extra $state" .venv/installed || missing=yes
    done
    if [[ -n $missing ]]; then
        heading "Installing miracle_jax and what it needs (the first time a minute or two and 1.4 GB)"
        $python -m pip install -qq --disable-pip-version-check -e "$package" ||
            fail "pip could not install the package; its reason is above (a network or a full disk, mostly). Then run this again"
        printf "%s $state\n" base "$@" >>.venv/installed
    fi
}

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then
    if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then usage; fi
    if [[ "${1:-}" == PYTHON=* ]]; then PYTHON=${1#PYTHON=} && shift; fi
    set_up "$@"
    echo "ready: $(.venv/bin/python --version) in .venv; \`source .venv/bin/activate\` uses it in this shell"
fi
