#!/usr/bin/env bash
# Trains a small model on arithmetic by asynchronous RL, on this machine's CPU. The first start
# installs everything, later ones take seconds. A stopped run is resumed; a complete one is renamed
# and a new one started. Arguments are settings:
#
#   bash launchers/quickstart.sh run.steps=10 staleness.max_staleness=0
set -euo pipefail
cd "$(dirname "$0")/.."

environments=$(bash tools/setup_env.sh)
eval "$environments"
export MEGATRON_ASYNC_RL_PYTHON MEGATRON_ASYNC_RL_ENGINE_PYTHON
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python=$MEGATRON_ASYNC_RL_PYTHON

data=runs/arithmetic
[ -f $data/train.jsonl ] ||
  "$python" tools/arithmetic.py $data/train.jsonl --count 2000 --seed 1 --split train
[ -f $data/eval.jsonl ] ||
  "$python" tools/arithmetic.py $data/eval.jsonl --count 256 --seed 2 --split eval
[ -f runs/tiny_model/config.json ] ||
  OMP_NUM_THREADS=1 "$python" tools/make_tiny_model.py runs/tiny_model

exec launchers/megatron-async-rl run configs/quickstart.yaml --new-if-complete "$@"
