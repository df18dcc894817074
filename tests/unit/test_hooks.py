"""The loader of hooks: one error text, signatures, digests of sources."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from config_builders import config_tree

from megatron_async_rl import hooks
from megatron_async_rl.config import load as configuration
from megatron_async_rl.config.config import Config
from megatron_async_rl.controller.filters import filter_rules
from megatron_async_rl.errors import ConfigError, HookFailed
from megatron_async_rl.storage import checkpoints, hook_digests

MODULE = """
def three(prompt, response, row): return 1.0
def four(rewards, lengths, row, config): return True
def two(prompt, response): return 1.0
def swapped(response, prompt, row): return 1.0
def any_number(*arguments): return 1.0
def raises(rewards, lengths, row, config): return rewards[0] / 0
def says_one(rewards, lengths, row, config): return 1
def changes_the_row(rewards, lengths, row, config): return row["tests"].pop() > 0
number = 3
class Needs:
    def __init__(self, size): pass
    def run(self, prompt, policy, sampling): pass
class Idle: pass
class Good:
    def run(self, prompt, policy, sampling): pass
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Writes a user's module; returns its name."""
    (tmp_path / "our_hooks.py").write_text(MODULE)
    (tmp_path / "our_broken_hooks.py").write_text("x = 1\nx.y\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "our_hooks"
    sys.modules.pop("our_hooks", None)


def config_with(**changes: object) -> Config:
    return configuration.from_tree(config_tree(**changes))


@pytest.mark.parametrize(
    ("setting", "value", "problem"),
    [
        ("reward.function", "maths", "neither a known name nor package.module:name"),
        ("reward.function", "our_hooks:absent", "has no attribute 'absent'"),
        ("reward.function", "our_hooks:number", "it is a int, not a function(prompt, response"),
        ("reward.function", "our_hooks:two", "its parameters (prompt, response) are not"),
        ("reward.function", "our_hooks:swapped", "in another order than ('prompt', 'response'"),
        ("reward.function", "no_such_module:f", "No module named 'no_such_module'"),
        ("reward.function", "our_hooks.py:three", "it names a file, not a module: leave .py out"),
        ("data.reader", "our_broken_hooks:f", "our_broken_hooks.py, line 2)"),
        ("rollout.workflow", "our_hooks:three", "it is a function, not a class"),
        ("rollout.workflow", "our_hooks:Needs", "constructor needs arguments"),
        ("rollout.workflow", "our_hooks:Idle", "it has no method `run`"),
    ],
)
def test_hook_that_cannot_be_used_is_named_with_its_remedy(
    module: str, setting: str, value: str, problem: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(problem)) as refused:
        hooks.load(setting, value)
    text = str(refused.value)
    assert text.startswith(f"{setting} = {value!r} cannot be loaded: ") and "\n" not in text
    assert "PYTHONPATH" in text and all(name in text for name in hooks.HOOKS[setting].built_in)


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("import no_such_package.part", "install no_such_package for /"),
        ("raise ModuleNotFoundError('hooks', name='hooks')", "install hooks for /"),
        ("raise ModuleNotFoundError('such')", "name math, code, "),
    ],
)
def test_package_that_a_hook_needs_is_to_be_installed(
    module: str, tmp_path: Path, text: str, remedy: str
) -> None:
    (tmp_path / "our_hooks.py").write_text(f"{text}\n")
    with pytest.raises(ConfigError, match=rf"py, line 1\); {remedy}"):
        hooks.load("reward.function", "our_hooks:three")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("reward.function", "our_hooks:three"),
        ("reward.function", "our_hooks:any_number"),
        ("rollout.workflow", "our_hooks:Good"),
    ],
)
def test_users_hook_is_loaded(module: str, setting: str, value: str) -> None:
    assert hooks.load(setting, value).__module__ == module


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        (setting, name)
        for setting, hook in hooks.HOOKS.items()
        for name, target in hook.built_in.items()
        if target
    ],
)
def test_built_in_names_lead_to_definitions_with_the_same_signature(
    setting: str, name: str
) -> None:
    assert callable(hooks.load(setting, name))


@pytest.mark.parametrize("setting", hooks.HOOKS)
def test_unknown_name_is_refused_with_the_configuration(setting: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"{setting} = 'other' cannot be loaded")):
        config_with(**{setting: "other"})


def test_options_without_a_function_of_ones_own_are_refused() -> None:
    key = "algorithm.loss.options"
    with pytest.raises(ConfigError, match=r"algorithm\.loss\.objective = decoupled_ppo"):
        config_with(**{key: {"width": 1}})
    config = config_with(**{key: {"width": 1}, "algorithm.loss.objective": "our_hooks:f"})
    assert config.algorithm.loss.options == {"width": 1}


# ---- group filters


def rule_of(function: str) -> Callable[..., bool]:
    settings = {"algorithm.filters.function": f"our_hooks:{function}"}
    [(reason, keeps)] = filter_rules(config_with(**settings).algorithm.filters)
    assert reason.value == "filtered"
    return keeps


def test_exception_of_a_users_filter_names_setting_and_line(module: str) -> None:
    assert rule_of("four")([1.0, 0.0], [3, 4], {}) is True
    with pytest.raises(HookFailed) as failed:
        rule_of("raises")([1.0], [3], {})
    first, *frames = str(failed.value).splitlines()
    assert first == (
        "algorithm.filters.function = our_hooks:raises failed: ZeroDivisionError: float division "
        "by zero"
    )
    assert "our_hooks.py" in frames[0] and "in raises" in frames[0]


def test_filter_must_return_a_boolean(module: str) -> None:
    with pytest.raises(HookFailed, match=r"our_hooks:says_one returned a int; return True"):
        rule_of("says_one")([1.0], [3], {})


def test_filter_cannot_change_the_row(module: str) -> None:
    row = {"tests": [1, 2]}
    assert rule_of("changes_the_row")([1.0], [3], row) is True
    assert row == {"tests": [1, 2]}


# ---- digests


def test_changed_hook_is_said_at_the_next_start(module: str, tmp_path: Path) -> None:
    config = config_with(**{"reward.function": "our_hooks:three"})
    assert hook_digests.record(tmp_path, config) == []
    digest = hashlib.sha256(MODULE.encode()).hexdigest()
    first = f"our_hooks:three sha256:{digest}"
    assert hook_digests.read(tmp_path) == {"reward.function": first}
    assert hook_digests.record(tmp_path, config) == []

    (tmp_path / "our_hooks.py").write_text(f"{MODULE}# another version\n")
    [change] = hook_digests.record(tmp_path, config)
    second = hook_digests.read(tmp_path)["reward.function"]
    assert first != second
    assert change == (
        "reward.function is another function than at the last start of this run: was "
        f"{first}, is {second}"
    )
    [change] = hook_digests.record(tmp_path, config_with())
    assert change.endswith(f"was {second}, is built-in")


def test_checkpoint_manifest_has_the_hooks(module: str, tmp_path: Path) -> None:
    folder = tmp_path / checkpoints.FOLDER / "v000001"
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"1")
    checkpoints.write_digests(folder, 0, ["weights"])
    without = checkpoints.commit(tmp_path, 1, folder.name, 0, 0)
    assert without.hooks == {} and checkpoints.list_manifests(tmp_path) == [without]
    hook_digests.record(tmp_path, config_with(**{"reward.function": "our_hooks:three"}))
    manifest = checkpoints.commit(tmp_path, 1, folder.name, 0, 0)
    assert manifest.hooks == hook_digests.read(tmp_path) != {}
    assert checkpoints.list_manifests(tmp_path) == [manifest]


def test_missing_file_of_a_hook_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.workflow = 'absent:W' cannot be loaded"):
        hook_digests.record(tmp_path, config_with(**{"rollout.workflow": "absent:W"}))
    assert not (tmp_path / hook_digests.HOOKS_FILE).exists()
