"""The configuration of a run, and values derived from several settings."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import msgspec

from megatron_async_rl.config.algorithm import AlgorithmConfig, CriticConfig
from megatron_async_rl.config.datasets import DataConfig, EvaluationConfig
from megatron_async_rl.config.sections import (
    CheckpointConfig,
    FaultsConfig,
    ModelConfig,
    MonitorConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    SandboxConfig,
    Section,
    StalenessConfig,
    TrainerConfig,
    WeightsConfig,
)

MAX_SEQUENCES = 64  # of an agent's episode; it bounds the messages of rollout workers


class Config(Section, frozen=True, kw_only=True):
    run: RunConfig
    model: ModelConfig
    data: DataConfig
    rollout: RolloutConfig
    algorithm: AlgorithmConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    critic: CriticConfig = CriticConfig()
    staleness: StalenessConfig = StalenessConfig()
    reward: RewardConfig = RewardConfig()
    sandbox: SandboxConfig = SandboxConfig()
    trainer: TrainerConfig = TrainerConfig()
    weights: WeightsConfig = WeightsConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultsConfig = FaultsConfig()
    monitor: MonitorConfig = MonitorConfig()
    megatron: dict[str, Any] = msgspec.field(default_factory=dict)
    sglang: dict[str, Any] = msgspec.field(default_factory=dict)

    @property
    def run_dir(self) -> Path:
        return Path(self.run.dir)

    def value(self, key: str) -> Any:
        """Returns a setting, or a section, by its dotted name."""
        return functools.reduce(getattr, key.split("."), self)

    def parallel_size(self, name: str) -> int:
        """Returns megatron.NAME_parallel_size, 1 if it is not set."""
        return int(self.megatron.get(f"{name}_parallel_size", 1))

    @property
    def engine_tp(self) -> int:
        """Tensor-parallel ranks of each server: sglang.tp_size."""
        return int(self.sglang.get("tp_size", 1))

    @property
    def on_cpu(self) -> bool:
        """True if the run uses no GPU: sglang.device is cpu."""
        return self.sglang.get("device") == "cpu"

    @property
    def has_agent(self) -> bool:
        return self.rollout.agent is not None or self.rollout.agent_command is not None

    @property
    def max_sequences(self) -> int:
        """Training sequences that one sample may have: the branches of an agent's episode."""
        return MAX_SEQUENCES if self.has_agent else 1

    @property
    def has_trainer(self) -> bool:
        return self.run.mode == "train"

    @property
    def sends_fp8(self) -> bool:
        """True if the trainer sends fp8 weights; without one, servers keep those of model.path."""
        return self.has_trainer and self.weights.quantization is not None

    @property
    def num_leaders(self) -> int:
        """Number of leaders: one per data-parallel replica, or the recorder."""
        return self.trainer.data_parallel_size if self.has_trainer else 1

    @property
    def trainer_ranks(self) -> int:
        names = ("tensor_model", "pipeline_model", "context")
        return self.trainer.data_parallel_size * math.prod(map(self.parallel_size, names))

    @property
    def trainer_names(self) -> list[str]:
        """The processes that start the trainer's ranks, in the order of the ranks."""
        one = self.trainer.hosts == 1 or not self.has_trainer
        return ["trainer"] if one else [f"trainer-{i}" for i in range(self.trainer.hosts)]

    @property
    def ranks_per_host(self) -> int:
        return self.trainer_ranks // len(self.trainer_names)
