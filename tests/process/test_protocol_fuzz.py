"""Wrong messages of any worker neither end the controller nor break its guarantees.

FUZZ_MESSAGES=50000 FUZZ_SEED=7 pytest -s tests/process/test_protocol_fuzz.py     longer
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from protocol_fuzz import ProtocolFuzz

NUM_MESSAGES = int(os.environ.get("FUZZ_MESSAGES", "2500"))
SEEDS = [int(os.environ["FUZZ_SEED"])] if "FUZZ_SEED" in os.environ else [1, 2]


@pytest.mark.parametrize("seed", SEEDS)
def test_wrong_messages_neither_end_the_controller_nor_break_its_guarantees(
    model_and_dataset: tuple[Path, Path], tmp_path: Path, seed: int
) -> None:
    fuzz = ProtocolFuzz(model_and_dataset, tmp_path, seed)
    result = asyncio.run(fuzz.run(NUM_MESSAGES))
    print(result)
    assert result.version >= 2, "the honest workers made no progress"
    assert fuzz.num_probes and fuzz.num_probed_batches  # of servers, and of the trainer
    assert result.wrong > NUM_MESSAGES // 10 and result.malformed
    assert {"rollout-0", "reward-0", "trainer-0"} <= result.refused.keys()
