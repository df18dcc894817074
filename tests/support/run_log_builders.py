"""Samples and configurations for tests of the run's log, and a reader of its TensorBoard files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_async_rl.config.config import Config
from megatron_async_rl.config.load import from_tree
from megatron_async_rl.observability.sample_log import TrainedGroup
from megatron_async_rl.protocol.types import Sample, Segment, join_segments


def log_config(run_dir: Path, **monitor: object) -> Config:
    return from_tree(
        {
            "run": {"dir": str(run_dir), "steps": 10},
            "model": {"path": "model", "context_tokens": 64},
            "data": {"train": "train.jsonl"},
            "rollout": {"max_new_tokens": 32},
            "algorithm": {"prompts_per_step": 1, "samples_per_prompt": 2},
            "staleness": {"max_staleness": 4},
            "monitor": monitor,
        }
    )


def sample_of_versions(*runs: tuple[int, int], text: str = "1+1=2") -> Sample:
    """Returns a sample of three prompt tokens and, for each (version, length), so many tokens."""
    segments = [Segment(version, [7] * length, [-0.5] * length) for version, length in runs]
    return join_segments(np.array([1, 2, 3], np.int32), segments, "stop", text)


def trained_group(*samples: Sample, rewards: list[float] | None = None) -> TrainedGroup:
    rewards = rewards or [1.0] * len(samples)
    return TrainedGroup(5, "p5", list(samples), rewards, [reward - 0.5 for reward in rewards])


def read_tensorboard(run_dir: Path) -> EventAccumulator:
    size_guidance = {"histograms": 0, "tensors": 0}  # 0: keep all
    return EventAccumulator(str(run_dir / "tensorboard"), size_guidance=size_guidance).Reload()
