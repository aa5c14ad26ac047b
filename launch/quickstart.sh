#!/usr/bin/env bash
# From a clean clone to personalised replies with nothing but Python 3.11 or newer: makes .venv, trains configs/tiny.py
# on the bundled corpus, answers test contexts with all eight personalities and measures how often the control works.
#
#   bash launch/quickstart.sh [PYTHON=python3.12]
#
# Run again, it goes on where it stopped; deleting runs/tiny trains afresh.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
source launch/pretrained.sh

for argument in "$@"; do
    case $argument in
        -h | --help) usage ;;
        PYTHON=*) PYTHON=${argument#PYTHON=} ;;
        *) fail "unknown argument $argument; quickstart.sh takes PYTHON=... only" ;;
    esac
done

set_up
install_pretrained

heading "The bundled model mini answers with every personality"
.venv/bin/python -m miracle_jax.generate mini "How was your day?" --personality all

heading "Training configs/tiny.py; the run is kept in runs/tiny"
.venv/bin/python -m miracle_jax.train --config configs/tiny.py --workdir runs/tiny

heading "Replies to test contexts with every personality"
.venv/bin/python -m miracle_jax.generate runs/tiny --data test --personality all --limit 3

heading "Control accuracy with and without the energy"
.venv/bin/python -m miracle_jax.evaluate runs/tiny --per-personality 20

heading "Done. To talk to it: .venv/bin/python -m miracle_jax.generate runs/tiny"
