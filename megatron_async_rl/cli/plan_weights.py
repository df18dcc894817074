"""`plan-weights`: prints how each parameter maps from trainer shards to engine shards."""

from __future__ import annotations

from pathlib import Path

import msgspec

from megatron_async_rl.config.config import Config
from megatron_async_rl.model import weight_plan


def run(config: Config, link_gb_s: float, json_path: Path | None) -> int:
    """Prints the summary of the plan and, with `json_path`, writes every route there."""
    plan = weight_plan.make(config, link_gb_s)
    print(weight_plan.summary(plan))
    if json_path:
        json_path.write_bytes(msgspec.json.encode(plan))
        print(f"every route: {json_path}")
    return 0
