"""Records the outputs of Megatron's modules during a forward pass, joined over parallel ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from megatron_async_rl.trainer.comparison.operations import (
    EMBEDDING,
    FINAL_NORM,
    LAYER,
    ROUTER,
    ROUTER_BIAS,
    Held,
    Operation,
    layer_operation,
)
from megatron_async_rl.trainer.model.build import TrainerModel


class Recorder:
    """Keeps the last output of every compared operation of this pipeline stage, if it `keeps`.

    A forward pass is then collective over the tensor-parallel ranks in each of these operations,
    of which one needs to keep the outputs.
    """

    def __init__(self, model: TrainerModel, keeps: bool) -> None:
        self._keeps = keeps
        self.outputs: dict[str, Tensor] = {}
        """Outputs by the name of the operation: [T, columns] of the whole sequence with padding;
        also the biases with which routers choose."""
        self._config = model.config
        self._hooks: list[RemovableHandle] = []
        self._groups = model.shape.num_query_groups
        for module in model.modules:
            self._watch(module)

    def remove(self) -> None:
        for handle in self._hooks:
            handle.remove()

    def _watch(self, module: nn.Module) -> None:
        parts = dict(module.named_modules())
        if "embedding" in parts:
            self._record(EMBEDDING, parts["embedding"], Held.TOKENS)
        for layer in module.decoder.layers:
            for operation in LAYER:
                part = dict(layer.named_modules()).get(operation.trainer)
                if part is not None:
                    name = layer_operation(layer.layer_number - 1, operation.name)
                    self._record_operation(name, part, operation)
                    if operation.name == ROUTER and part.expert_bias is not None:
                        name = layer_operation(layer.layer_number - 1, ROUTER_BIAS)
                        self.outputs[name] = part.expert_bias.detach().cpu()
        if "decoder.final_layernorm" in parts:
            self._record(FINAL_NORM, parts["decoder.final_layernorm"], Held.TOKENS)

    def _record_operation(self, name: str, part: nn.Module, operation: Operation) -> None:
        if operation.name == ROUTER:
            self._record(name, part, operation.held, lambda hidden, output: part.gating(hidden))
        elif operation.is_input:
            self._record(name, part, operation.held, lambda hidden, output: hidden)
        else:
            self._record(name, part, operation.held)

    def _record(
        self,
        name: str,
        part: nn.Module,
        held: Held,
        choose: Callable[[Any, Any], Any] = lambda hidden, output: output,
    ) -> None:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any):
            hidden = args[0] if args else kwargs.get("hidden_states")
            tensor = choose(hidden, output)
            tensor = tensor[0] if isinstance(tensor, tuple) else tensor
            # a copy: Megatron adds to some outputs in place
            joined = self._joined(tensor.detach().clone(), held)
            if self._keeps:
                self.outputs[name] = joined.cpu()

        self._hooks.append(part.register_forward_hook(hook, with_kwargs=True))

    def _joined(self, tensor: Tensor, held: Held) -> Tensor:
        """Returns the whole output [T, columns] from this rank's part [T or part, 1, columns]."""
        part = tensor.reshape(-1, tensor.shape[-1])
        if held is Held.TOKENS:
            return torch.cat(_of_all(part)) if self._config.sequence_parallel else part
        if held is Held.GATE_UP:
            halves = [part.chunk(2, dim=-1) for part in _of_all(part)]
            return torch.cat([gate for gate, _ in halves] + [up for _, up in halves], dim=-1)
        whole = torch.cat(_of_all(part), dim=-1)
        if held is not Held.QKV:
            return whole
        config = self._config
        return query_key_value(
            whole, self._groups, config.kv_channels, config.attention_output_gate
        )


def query_key_value(grouped: Tensor, num_groups: int, size: int, gated: bool) -> Tensor:
    """Returns [queries, keys, values] from the columns group by group; `size`: of a head.

    gated: the gates, which Megatron has behind all queries of a group, follow each its query.
    """
    groups = grouped.unflatten(-1, (num_groups, -1))
    width = groups.shape[-1] - 2 * size
    queries, keys, values = groups.split([width, size, size], dim=-1)
    if gated:
        queries = queries.unflatten(-1, (2, -1, size)).transpose(-3, -2).flatten(-3)
    return torch.cat([part.flatten(-2) for part in (queries, keys, values)], dim=-1)


def _of_all(part: Tensor) -> list[Tensor]:
    """Returns the parts of all tensor-parallel ranks."""
    group = mpu.get_tensor_model_parallel_group()
    if group.size() == 1:
        return [part]
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    return parts
