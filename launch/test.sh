#!/usr/bin/env bash
# Lint and the whole test suite, in the environment of quickstart.sh with the test tools added.
#
#   bash launch/test.sh [PYTHON=python3.12] [--with-torch] [pytest arguments ...]
#
# --with-torch adds PyTorch and the pretrained weights of launch/pretrained.sh, and with them the tests that compare with
# both live; without them they are skipped.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
source launch/pretrained.sh

with_torch=""
while [[ $# -gt 0 ]]; do
    case $1 in
        -h | --help) usage ;;
        PYTHON=*) PYTHON=${1#PYTHON=} ;;
        --with-torch) with_torch=yes ;;
        *) break ;;
    esac
    shift
done

set_up test corpus

# On Linux pip may take the CUDA build, several gigabytes. A PyTorch that is in .venv already is left alone, so whoever
# wants the CPU build installs that into .venv first.
if [[ -n $with_torch ]] && ! suitable .venv/bin/python torch; then
    heading "Installing PyTorch"
    .venv/bin/python -m pip install -qq --disable-pip-version-check torch==2.13.0 || fail "pip could not install torch==2.13.0"
fi
if [[ -n $with_torch ]]; then
    # transformers asks for it to read GGUF files, the reference that ours are compared with.
    suitable .venv/bin/python accelerate || .venv/bin/python -m pip install -qq --disable-pip-version-check accelerate ||
        fail "pip could not install accelerate"
    install_pretrained
fi

heading "Lint"
.venv/bin/ruff check .

heading "Tests"
# Two processes, by files, whose fixtures are costly, in the order of tests/conftest.py.
.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
