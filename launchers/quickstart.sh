#!/usr/bin/env bash
# Asynchronous RL of a small model on arithmetic, on this machine's CPU. Sets everything up first; a second start takes
# seconds. Arguments are settings, such as: bash launchers/quickstart.sh run.steps=10 staleness.max_staleness=0
set -euo pipefail
cd "$(dirname "$0")/.."

environments=$(bash tools/setup_env.sh)
eval "$environments"
export MEGATRON_ASYNC_RL_ENGINE_PYTHON
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python=$MEGATRON_ASYNC_RL_PYTHON

[ -f runs/arithmetic/train.jsonl ] || "$python" tools/arithmetic.py runs/arithmetic/train.jsonl --count 2000 --seed 1 --split train
[ -f runs/arithmetic/eval.jsonl ] || "$python" tools/arithmetic.py runs/arithmetic/eval.jsonl --count 256 --seed 2 --split eval
[ -f runs/tiny_model/config.json ] || OMP_NUM_THREADS=1 "$python" tools/make_tiny_model.py runs/tiny_model

fresh=()  # a stopped run goes on; a finished one is kept aside and another begins
[ ! -d runs/quickstart/policy ] || fresh=(--from-scratch)
exec "$python" -m megatron_async_rl run configs/quickstart.yaml "${fresh[@]}" "$@"
