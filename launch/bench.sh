#!/usr/bin/env bash
# The benchmarks against PyTorch, in the environment of quickstart.sh with PyTorch and two ODE libraries for it added.
#
#   bash launch/bench.sh [PYTHON=python3.12] [--size tiny|base|paper] [--device cpu|gpu] [--curves] [--out FILE] ...
#
# All other arguments go to `python -m benchmarks`, whose own --help explains them. For a GPU, first:
# bash launch/setup.sh cuda
set -euo pipefail
source "$(dirname "$0")/setup.sh"

while [[ $# -gt 0 ]]; do
    case $1 in
        -h | --help) usage ;;
        PYTHON=*) PYTHON=${1#PYTHON=} ;;
        *) break ;;
    esac
    shift
done

set_up

# As in test.sh: a PyTorch that is in .venv already is left alone, and whoever wants another build installs it first.
if ! suitable .venv/bin/python torch; then
    heading "Installing PyTorch"
    .venv/bin/python -m pip install -qq --disable-pip-version-check torch==2.13.0 || fail "pip could not install torch==2.13.0"
fi
if ! suitable .venv/bin/python "torchdiffeq, torchode"; then
    heading "Installing torchdiffeq and torchode"
    # Without what they ask for, which is PyTorch, there already, and what torchode imports, which is named here.
    .venv/bin/python -m pip install -qq --disable-pip-version-check --no-deps \
        torchdiffeq==0.2.5 torchode==1.0.1 torchtyping==0.1.5 typeguard==4.6.0 ||
        fail "pip could not install torchdiffeq and torchode; its reason is above"
fi

heading "Benchmarks"
.venv/bin/python -m benchmarks "$@"
