"""`compare-logprobs`: finds the first operation in which engine and trainer differ.

    an SGLang server  samples responses to prompts of data.train, then computes the logprobs of all
                      their tokens by one prefill each and writes the output of every operation
    trainer ranks     run the same tokens and compare (trainer/comparison/)

Both have the weights of model.path, and the layouts and precisions of the configuration.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import msgspec

from megatron_async_rl import installed, processes
from megatron_async_rl.cli import offline
from megatron_async_rl.config import load as configuration
from megatron_async_rl.config.config import Config
from megatron_async_rl.data.dataset import read_training
from megatron_async_rl.data.order import PromptStream
from megatron_async_rl.data.tokenizer import Tokenizer
from megatron_async_rl.engine_env import engine_python
from megatron_async_rl.errors import ConfigError
from megatron_async_rl.rollout.engine_client import Sampling
from megatron_async_rl.rollout.engine_process import SGLangServer
from megatron_async_rl.trainer.comparison import sequences as files
from megatron_async_rl.trainer.comparison.sequences import ComparedSequence

# Whole sequences in one forward pass each, through modules that a hook can see.
_OBSERVABLE = {
    "disable_radix_cache": True,
    "disable_cuda_graph": True,
    "disable_piecewise_cuda_graph": True,
    "chunked_prefill_size": -1,
    "skip_server_warmup": True,
}


def run(config: Config, num_prompts: int, num_tokens: int) -> int:
    """Compares on that many prompts, with that many sampled tokens each; prints the table.

    Returns 1 if an operation differs by more than rounding. Raises ConfigError, DataError,
    EngineError.
    """
    _check(config, num_prompts, num_tokens)
    tokenizer = Tokenizer(config.model.path, config.reward.thinking_tags)
    prompts = PromptStream(read_training(config, tokenizer, _say), config.run.seed)
    chosen = [prompts.next().ids.tolist() for _ in range(num_prompts)]
    with processes.temporary_folder() as folder:
        for name in ("logs", "keys"):
            (folder / name).mkdir(mode=0o700)
        _say("starting an SGLang server that writes the output of every operation")
        sequences = asyncio.run(_of_engine(_observed(config, folder), folder, chosen, num_tokens))
        files.write(folder / files.NAME, sequences)
        _say(f"{len(sequences)} sequences are sampled; the trainer runs them now")
        return offline.run_ranks(_trainer_config(config), folder, "comparison.ranks", str(folder))


def _say(text: str) -> None:
    sys.stderr.write(f"compare-logprobs: {text}\n")


def _check(config: Config, num_prompts: int, num_tokens: int) -> None:
    if num_prompts < 1:
        raise ConfigError(f"--prompts {num_prompts}: at least one is needed", "give a larger one")
    if not 1 <= num_tokens <= config.rollout.max_new_tokens:
        raise ConfigError(
            f"--tokens {num_tokens} is not between 1 and rollout.max_new_tokens = "
            f"{config.rollout.max_new_tokens}",
            "give one in this range, or set the other",
        )
    if not config.has_trainer:
        raise ConfigError(
            f"run.mode = {config.run.mode} has no trainer to compare with", "remove it"
        )


def _observed(config: Config, folder: Path) -> Config:
    """Returns the configuration of a server that writes its operations below `folder`."""
    python = engine_python()
    known = installed.engine_settings(python).settings if python else {}
    own: dict[str, Any] = {key: value for key, value in _OBSERVABLE.items() if key in known}
    own["debug_tensor_dump_output_folder"] = str(folder / files.ENGINE_FOLDER)
    tree = msgspec.to_builtins(config)
    tree["sglang"] |= {key: value for key, value in own.items() if key not in tree["sglang"]}
    tree["weights"]["quantization"] = None  # no trainer sends this server fp8 weights
    observed = configuration.from_tree(tree)
    observed.sglang["weight_version"] = "0"  # a run sets it, so configuration files must not
    return observed


def _trainer_config(config: Config) -> Config:
    """Returns the configuration of as many ranks, each of which holds whole sequences."""
    tree = msgspec.to_builtins(config)
    tree["rollout"]["temperature"] = 1.0  # of a prefill's logprobs
    if config.parallel_size("context") > 1:
        del tree["megatron"]["context_parallel_size"]
        tree["trainer"]["data_parallel_size"] *= config.parallel_size("context")
        # the rule for batches, none of which is trained here, then holds as it did before
        tree["algorithm"]["prompts_per_step"] *= config.parallel_size("context")
    return configuration.from_tree(tree)


async def _of_engine(
    config: Config, folder: Path, prompts: list[list[int]], num_tokens: int
) -> list[ComparedSequence]:
    server = SGLangServer(config, folder, "server", temporary=folder)
    sampling = Sampling(num_tokens, temperature=1.0, stop_token_ids=[])
    found = []
    try:
        await server.start()
        for prompt in prompts:
            [segment] = (await server.client.generate(prompt, sampling)).segments
            ids = prompt + segment.ids
            _, prefill = await server.client.input_logprobs(ids, 1)
            found.append(ComparedSequence(ids, segment.logprobs, prefill))
    finally:
        await server.stop()
    return found
