#!/usr/bin/env bash
# Makes the environment that quickstart.sh, test.sh and bench.sh use: .venv at the top of the checkout, with the package
# in it. On its own it adds extras named in pyproject.toml, for instance `bash launch/setup.sh cuda`.
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
