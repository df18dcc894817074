#!/usr/bin/env bash
# Sets up what the tests need and runs the whole suite; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

environments=$(bash tools/setup_env.sh)
eval "$environments"
export MEGATRON_ASYNC_RL_ENGINE_PYTHON
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

"$MEGATRON_ASYNC_RL_PYTHON" -m ruff check .
"$MEGATRON_ASYNC_RL_PYTHON" -m ruff format --check .
exec "$MEGATRON_ASYNC_RL_PYTHON" -m pytest "$@"
