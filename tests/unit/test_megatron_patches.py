"""CPU patches of megatron-core: found, applied once, rejected for code that they do not match."""

from __future__ import annotations

import os
import types
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch.distributed import FileStore
from torch.distributed import distributed_c10d as c10d

from megatron_async_rl.patches import patches_dir, prepare_megatron

prepare_megatron()

import megatron_cpu
import patch_checks

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="patches are not applied with CUDA"
)


def test_patch_folder_is_found_next_to_the_package() -> None:
    assert (patches_dir() / "megatron_cpu" / "README.md").is_file()


def test_second_call_changes_nothing() -> None:
    before = torch.cuda.current_device
    prepare_megatron()
    assert torch.cuda.current_device is before
    assert torch.cuda.current_device() == torch.device("cpu")


def test_constants_are_replaced_in_nested_functions() -> None:
    def outer() -> object:
        return "cuda", ("torch.cuda.FloatTensor", 1), lambda: "cuda", "cuda:0"

    code, swapped = megatron_cpu._swap_constants(outer.__code__)
    outer.__code__ = code
    first, pair, inner, untouched = outer()
    assert (first, pair, inner(), untouched, swapped) == (
        "cpu",
        ("torch.FloatTensor", 1),
        "cpu",
        "cuda:0",
        3,
    )


def test_fork_has_a_gloo_device_of_its_own(tmp_path: Path) -> None:
    """The thread of the parent's device is not in the fork."""

    def summed(name: str, rank: int, size: int) -> float:
        store = FileStore(str(tmp_path / name), size)
        group = c10d.ProcessGroupGloo(store, rank, size, timeout=timedelta(seconds=5))
        tensor = torch.ones(1)
        group.allreduce([tensor]).wait()
        return tensor.item()

    assert summed("before", 0, 1) == 1
    if not (child := os.fork()):
        code = 1
        try:
            code = int(summed("both", 1, 2) != 2)
        finally:
            os._exit(code)
    try:
        assert summed("both", 0, 2) == 2
    finally:
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_missing_patch_target_error_names_it() -> None:
    module = types.ModuleType("megatron.core.somewhere")
    with pytest.raises(patch_checks.DriftError, match=r"megatron\.core\.somewhere\.step is gone"):
        patch_checks.require(module, "step")
    with pytest.raises(patch_checks.DriftError, match=r"megatron\.core\.no\.such\.module is gone"):
        patch_checks.core_module("no.such.module")


def test_function_without_the_constant_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions patched before in this process lack the constant, like a newer megatron-core."""
    monkeypatch.setattr(megatron_cpu, "_RETARGETED", {"utils": ["local_multi_tensor_l2_norm"]})
    with pytest.raises(patch_checks.DriftError, match="holds no 'cuda' constant any more"):
        megatron_cpu._retarget()
    monkeypatch.setattr(megatron_cpu, "_RETARGETED", {"utils": ["a_function_that_was_renamed"]})
    with pytest.raises(patch_checks.DriftError, match="a_function_that_was_renamed is gone"):
        megatron_cpu._retarget()
