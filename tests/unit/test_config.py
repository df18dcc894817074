"""Errors of a configuration name the key, the value, the rule and the remedy."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from config_builders import config_tree
from paths import ROOT

from megatron_async_rl.config import documentation, explain, load
from megatron_async_rl.config.config import Config
from megatron_async_rl.config.sections import Section
from megatron_async_rl.errors import ConfigError

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def error_text(**changes: Any) -> str:
    with pytest.raises(ConfigError) as refused:
        load.from_tree(config_tree(**changes))
    return str(refused.value)


def all_settings() -> list[tuple[str, Any]]:
    """Returns every setting as its dotted key and its type in msgspec's terms."""

    def below(path: str, section: type[Section]) -> Iterator[tuple[str, Any]]:
        for field in msgspec.structs.fields(section):
            if isinstance(field.type, type) and issubclass(field.type, Section):
                yield from below(f"{path}{field.name}.", field.type)
            elif path:
                yield f"{path}{field.name}", msgspec.inspect.type_info(field.type)

    return list(below("", Config))


def number_types(info: Any) -> list[Any]:
    """Returns the int and float types with a lower bound inside a type such as int | None."""
    if isinstance(info, msgspec.inspect.Metadata):
        return number_types(info.type)
    if isinstance(info, msgspec.inspect.UnionType):
        return [number for member in info.types for number in number_types(member)]
    is_number = isinstance(info, (msgspec.inspect.IntType, msgspec.inspect.FloatType))
    return [info] if is_number and (info.ge is not None or info.gt is not None) else []


LIMITS = [
    (key, number.gt if number.gt is not None else number.ge - 1)
    for key, info in all_settings()
    for number in number_types(info)
]


def load_text(path: Path, text: str, *overrides: str) -> Config:
    path = path / "config.yaml"
    path.write_text(text)
    return load.load(path, list(overrides))


def test_minimal_configuration_is_valid() -> None:
    settings = load.from_tree(config_tree())
    assert settings.staleness.max_staleness == 4
    assert settings.reward.function == "math"
    assert settings.trainer_ranks == 1


def test_every_setting_has_a_description() -> None:
    assert [key for key, _ in all_settings() if not explain._description(key)] == []


def test_documentation_of_settings_is_current() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == documentation.markdown()


@pytest.mark.parametrize(("key", "value"), LIMITS, ids=[key for key, _ in LIMITS])
def test_number_out_of_range_is_rejected_by_name(key: str, value: float) -> None:
    text = error_text(**{key: value})
    assert text.startswith(f"{key} = {value!r}: expected ")
    assert f"{key}=VALUE" in text


def test_most_numbers_have_a_range() -> None:
    assert len(LIMITS) > 30


def takes_list(info: Any) -> bool:
    if isinstance(info, msgspec.inspect.UnionType):
        return any(takes_list(member) for member in info.types)
    return isinstance(info, msgspec.inspect.VarTupleType)


@pytest.mark.parametrize(("key", "info"), all_settings(), ids=[key for key, _ in all_settings()])
def test_value_of_wrong_type_is_rejected_by_name(key: str, info: Any) -> None:
    wrong: Any = {"a": "mapping"} if takes_list(info) else ["a", "list"]
    assert error_text(**{key: wrong}).startswith(f"{key} = {wrong!r}: expected ")


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("staleness.etta", "staleness.max_staleness"),
        ("algorithm.loss.clip_epsilon", "algorithm.loss.clip_eps"),
        ("rollout.max_tokens", "rollout.max_new_tokens"),
        ("trainer.data_parallel", "trainer.data_parallel_size"),
        ("stalenes", "staleness"),
    ],
)
def test_unknown_key_error_suggests_the_nearest_key(key: str, nearest: str) -> None:
    assert error_text(**{key: 1}).startswith(f"{key} is not a setting; did you mean {nearest}?")


@pytest.mark.parametrize(
    ("key", "place"),
    [
        ("rollout.steps", "run.steps"),
        ("trainer.learning_rate", "megatron.lr"),
        ("algorithm.lr", "megatron.lr"),
        ("algorithm.max_grad_norm", "megatron.clip_grad"),
        ("rollout.chat_template", "data.chat_template"),
        ("trainer.weight_decay", "megatron.weight_decay"),
    ],
)
def test_unknown_key_error_names_the_section_that_has_it(key: str, place: str) -> None:
    assert error_text(**{key: 1}).startswith(f"{key} is not a setting; did you mean {place}?")


def test_unknown_key_without_a_near_one_lists_known_keys() -> None:
    text = error_text(**{"staleness.qqq": 1})
    assert text.startswith("staleness.qqq is not a setting;")
    assert text.endswith("Known here: max_staleness, straggler_policy, straggler_timeout_s")


@pytest.mark.parametrize(
    "key", ["run.steps", "model.context_tokens", "data.train", "algorithm.prompts_per_step"]
)
def test_missing_required_setting_error_describes_it(key: str) -> None:
    section, name = key.split(".")
    incomplete = config_tree()
    del incomplete[section][name]
    with pytest.raises(
        ConfigError,
        match=f"{key} is not set, and has no default. .+ Set it in the YAML or with {key}=VALUE",
    ):
        load.from_tree(incomplete)


def test_missing_section_is_rejected() -> None:
    incomplete = config_tree()
    del incomplete["model"]
    with pytest.raises(ConfigError, match=r"model is not set.* at least path, context_tokens"):
        load.from_tree(incomplete)


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ('node "agent.js', ": No closing quotation; quote it as in a shell"),
        (" ", "is empty; name"),
        ("", "is empty; name"),
    ],
)
def test_agent_command_is_read_as_a_shell_does(command: str, problem: str) -> None:
    assert problem in error_text(**{"rollout.agent_command": command})


@pytest.mark.parametrize("path", ["~/runs/a", "$SCRATCH/a"])
@pytest.mark.parametrize("key", ["run.dir", "model.path", "data.train", "data.filter.run"])
def test_path_that_only_a_shell_expands_is_refused(key: str, path: str) -> None:
    assert error_text(**{key: path}).startswith(f"{key} = {path}: ~ and variables are not expanded")
    text = error_text(**{"data.train": [{"path": path}]})
    assert text.endswith("write the whole path")  # an entry of a list cannot be overridden


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"monitor.loggers": ["tensorboard", "x"]}, "monitor.loggers[1] = 'x': expected one of 't"),
        ({"data.train": [{"path": "a"}, {"path": 3}]}, "data.train[1].path = 3: expected a text"),
        (
            {"data.train": [{"path": "a", "format": "x"}]},
            "data.train[0].format = 'x': expected one",
        ),
    ],
)
def test_wrong_entry_of_a_list_is_named(changes: dict[str, Any], text: str) -> None:
    assert error_text(**changes).startswith(text)


@pytest.mark.parametrize(
    ("key", "choices"),
    [
        ("weights.transport", "'network', 'disk'"),
        ("trainer.precision", "'fp32', 'bf16', 'fp16'"),
    ],
)
def test_unknown_choice_error_lists_the_choices(key: str, choices: str) -> None:
    assert error_text(**{key: "other"}).startswith(f"{key} = 'other': expected one of {choices}.")


@pytest.mark.parametrize("value", [True, 2.5, "3", None])
def test_integer_setting_accepts_only_integers(value: Any) -> None:
    assert error_text(**{"staleness.max_staleness": value}).startswith(
        f"staleness.max_staleness = {value!r}: expected an integer"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"rollout.max_new_tokens": 128},
            ["rollout.max_new_tokens = 128", "model.context_tokens = 128", "lower"],
        ),
        (
            {"algorithm.samples_per_prompt": 300},
            ["algorithm.samples_per_prompt = 300", "rollout.max_concurrent_samples = 256"],
        ),
        (
            {"trainer.data_parallel_size": 3},
            ["samples_per_prompt = 8", "trainer.data_parallel_size = 3"],
        ),
        ({"algorithm.minibatches": 9}, ["algorithm.minibatches = 9", "lower it"]),
        (
            {"algorithm.minibatches": 5, "trainer.data_parallel_size": 2},
            ["algorithm.minibatches = 5", "lower it"],
        ),
        (
            {"algorithm.samples_per_prompt": 1},
            ["algorithm.advantage.group_normalize", "algorithm.samples_per_prompt >= 2"],
        ),
        (
            {
                "algorithm.staleness_correction.m2_threshold": 0.04,
                "algorithm.loss.objective": "ppo",
            },
            ["m2_threshold = 0.04", "loss.objective = ppo", "recompute"],
        ),
        (
            {"weights.kv_cache": "keep", "weights.interrupt": "retract"},
            [
                "weights.kv_cache = keep",
                "weights.interrupt = retract",
                "weights.kv_cache=recompute",
            ],
        ),
        (
            {"weights.kv_cache": "keep", "weights.interrupt": "finish"},
            ["weights.interrupt = finish leaves no request", "weights.kv_cache = keep"],
        ),
        (
            {"weights.kv_cache": "keep"},
            ["weights.kv_cache = keep", "sglang.disable_overlap_schedule = true"],
        ),
        (
            {"model.context_tokens": 16384},
            ["context_tokens = 16384", "trainer.max_tokens_per_microbatch = 8192", "micro-batch"],
        ),
        ({"sglang.max_total_tokens": 130}, ["max_total_tokens = 130", "context_tokens = 128"]),
        (
            {
                "algorithm.samples_per_prompt": 1,
                "algorithm.filters.drop_equal_rewards": True,
                "algorithm.advantage.estimator": "reinforce_pp",
            },
            ["drop_equal_rewards = true", "samples_per_prompt = 1"],
        ),
        (
            {
                "algorithm.samples_per_prompt": 1,
                "algorithm.prompts_per_step": 1,
                "algorithm.advantage.estimator": "reinforce_pp",
            },
            ["trains nothing", "batch of one sample"],
        ),
        (
            {
                "algorithm.filters.success_rate_min": 0.9,
                "algorithm.filters.success_rate_max": 0.1,
            },
            ["success_rate_min = 0.9", "success_rate_max = 0.1"],
        ),
        (
            {"algorithm.filters.success_rate_min": 1.5},
            ["success_rate_min = 1.5 drops every group", "reward.function = math are from 0 to 1"],
        ),
        (
            {
                "algorithm.filters.success_rate_min": 1.0,
                "algorithm.filters.drop_equal_rewards": True,
            },
            ["success_rate_min = 1 with algorithm.filters.drop_equal_rewards = true drops every"],
        ),
        (
            {
                "algorithm.filters.success_rate_max": 0.0,
                "algorithm.filters.drop_equal_rewards": True,
            },
            ["success_rate_max = 0 with algorithm.filters.drop_equal_rewards = true drops every"],
        ),
        (
            {"algorithm.staleness_correction.behavior_weight_floor": 6.0},
            ["behavior_weight_floor = 6", "behavior_weight_cap = 5", "no ratio"],
        ),
        ({"faults.min_servers": 2}, ["faults.min_servers = 2", "rollout.servers = 1"]),
        ({"megatron.bf16": True}, ["megatron.bf16", "trainer.precision"]),
        ({"megatron.num_layers": 3}, ["megatron.num_layers", "config.json"]),
        ({"sglang.dp_size": 2}, ["sglang.dp_size = 2", "rollout.servers"]),
        ({"sglang.context_length": 64}, ["sglang.context_length", "model.context_tokens"]),
        ({"sglang.api_key": "x"}, ["sglang.api_key", "remove the key"]),
        (
            {"megatron.tensor_model_parallel_size": 0},
            ["megatron.tensor_model_parallel_size = 0", "integer >= 1"],
        ),
        (
            {"megatron.context_parallel_size": "2"},
            ["megatron.context_parallel_size = '2'", "integer >= 1"],
        ),
    ],
)
def test_contradicting_settings_error_names_both(changes: dict[str, Any], words: list[str]) -> None:
    text = error_text(**changes)
    assert [word for word in words if word not in text] == []


def test_settings_at_the_limit_of_a_rule_are_allowed() -> None:
    load.from_tree(config_tree(**{"rollout.max_new_tokens": 127}))
    load.from_tree(config_tree(**{"algorithm.samples_per_prompt": 256}))
    load.from_tree(config_tree(**{"model.context_tokens": 8192}))
    load.from_tree(config_tree(**{"sglang.max_total_tokens": 136, "sglang.dp_size": 1}))
    load.from_tree(config_tree(**{"faults.min_servers": 2, "rollout.servers": 2}))
    load.from_tree(
        config_tree(**{"weights.kv_cache": "keep", "sglang.disable_overlap_schedule": True})
    )
    load.from_tree(config_tree(**{"algorithm.minibatches": 4, "trainer.data_parallel_size": 2}))
    load.from_tree(
        config_tree(
            **{"algorithm.samples_per_prompt": 1, "algorithm.advantage.group_normalize": False}
        )
    )


def test_trainer_ranks_are_the_product_of_the_parallel_sizes() -> None:
    sizes = {"tensor_model": 2, "pipeline_model": 2, "context": 2}
    changes = {f"megatron.{name}_parallel_size": size for name, size in sizes.items()}
    assert (
        load.from_tree(config_tree(**changes, **{"trainer.data_parallel_size": 2})).trainer_ranks
        == 16
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("1E2", 100.0), ("1.5e-6", 1.5e-6), ("+2e0", 2.0), ("1.", 1.0), ("3", 3.0)],
)
def test_float_may_be_written_in_common_notations(tmp_path: Path, text: str, value: float) -> None:
    (tmp_path / "config.yaml").write_text(load.dump(load.from_tree(config_tree())))
    assert (
        load.load(
            tmp_path / "config.yaml", [f"algorithm.loss.clip_eps={text}"]
        ).algorithm.loss.clip_eps
        == value
    )


def test_dumped_configuration_loads_unchanged(tmp_path: Path) -> None:
    changes = {
        "algorithm.loss.clip_eps": 1e-7,
        "algorithm.loss.clip_eps_high": None,
        "run.dir": "runs/with: colon and 'quotes' é",
        "evaluation.sets": {"no": {"path": "e.jsonl", "samples": 4, "temperature": 0.6}},
        "sglang": {"mem_fraction_static": 0.8, "nested": {"list": [1, "two", None]}},
        "megatron.lr": 1e-06,
    }
    settings = load.from_tree(config_tree(**changes))
    assert load_text(tmp_path, load.dump(settings)) == settings


def test_overrides_replace_file_values_and_the_last_wins(tmp_path: Path) -> None:
    text = load.dump(load.from_tree(config_tree()))
    settings = load_text(
        tmp_path,
        text,
        "staleness.max_staleness=7",
        "staleness.max_staleness=0",
        "sglang.new.key=[1, 2]",
        "reward.function=my.rewards:f",
        "run.dir=a=b",
    )
    assert settings.staleness.max_staleness == 0
    assert settings.sglang["new"] == {"key": [1, 2]}
    assert settings.reward.function == "my.rewards:f"
    assert settings.run.dir == "a=b"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("staleness.max_staleness", "not of the form key=value"),
        ("=3", "not of the form key=value"),
        ("staleness.max_staleness=[", "not YAML"),
        ("run.dir.x=3", "dir is a value, not a section"),
        ("staleness.etta=3", "did you mean staleness.max_staleness?"),
        ("staleness.max_staleness=-1", "staleness.max_staleness = -1"),
        ("staleness.max_staleness=", "staleness.max_staleness = None"),
        ("staleness=3", "staleness = 3"),
    ],
)
def test_invalid_override_is_rejected(tmp_path: Path, override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("?", r"\?")):
        load_text(tmp_path, load.dump(load.from_tree(config_tree())), override)


@pytest.mark.parametrize(
    ("text", "value"),
    [("010", 10), ("0o17", 15), ("0x1F", 31), ("1_000", 1000), ("-0", 0), ("0b11", 3)],
)
def test_whole_numbers_are_those_of_yaml_1_2(tmp_path: Path, text: str, value: int) -> None:
    config = load_text(tmp_path, load.dump(load.from_tree(config_tree())), f"sglang.x={text}")
    assert config.sglang["x"] == value


@pytest.mark.parametrize(("text", "words"), [
    ("99999999999999999999", "run.steps = 99999999999999999999: expected a number of at most"),
    ("!!binary aGk=", "a bytes is not a value; write it in quotes"),
    ("!!set {a}", "a set is not a value"),
    ("!!int text", "is not YAML: expected a value that fits its tag"),
    ("!!bool maybe", "is not YAML: expected a value that fits its tag"),
    ("!!timestamp text", "is not YAML: expected a value that fits its tag"),
    ("9" * 5000, "is not YAML: expected a value that fits its tag"),
])  # fmt: skip
def test_values_that_are_not_plain_are_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        load_text(tmp_path, "run: {}", f"run.steps={text}")


def test_any_text_is_the_same_after_it_was_written_and_read(tmp_path: Path) -> None:
    draw = random.Random(5)
    texts = [
        "1e-3",
        "0o17",
        "2024-01-31",
        "1:30",
        "yes",
        "~",
        "",
        ".inf",
        "a: b",
        "\x07",
        "=",
        "<<",
    ]
    texts += ["".join(draw.choices("0123456789eE+-._:xob ntruy", k=4)) for _ in range(300)]
    values = {f"k{number}": text for number, text in enumerate(texts)}
    config = load.from_tree(config_tree(**{"data.chat_template_kwargs": values}))
    assert load_text(tmp_path, load.dump(config)).data.chat_template_kwargs == values


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("run: [", "is not YAML"),
        ("- a\n- b", "must hold a mapping of sections, got list"),
        ("", r"config\.yaml is empty"),
        ("# nothing yet", r"config\.yaml is empty"),
        ("run: !!python/object/apply:os.getcwd []", "is not YAML: line 1, column 6: could not"),
        ("run:\n\tdir: a", "is not YAML: line 2, column 1: a tab, where YAML takes spaces only"),
        ("run: {dir: a\ndata: {", "is not YAML: line 2, column 5: .* that begins in line 1"),
        ("run: {}\ndata: {}\nrun: {}", "is not YAML: duplicate key run in lines 1 and 3"),
        ("run: {dir: a, dir: b}", "is not YAML: duplicate key dir in lines 1 and 1"),
        ("rollout: fast", r"rollout = 'fast': expected a mapping, .* such as `max_new_tokens: "),
        ("[" * 3000, "is not YAML: brackets must not be nested"),
        ("run: &a {dir: *a}", "is not YAML: line 1, column 6: found unconstructable recursive"),
        ("run:\nsglang:\n", "run is empty: write its settings below it, indented, or remove"),
    ],
)
def test_file_that_is_not_a_configuration_is_rejected(
    tmp_path: Path, text: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        load_text(tmp_path, text)


def test_unreadable_file_error_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        load.load(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="directory"):
        load.load(tmp_path)


def test_binary_file_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError):
        load.load(tmp_path / "config.yaml")


def test_duplicate_section_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="staleness"):
        load_text(tmp_path, load.dump(load.from_tree(config_tree())) + "\nstaleness: {eta: 1}\n")


def test_key_that_is_not_a_string_is_rejected_by_name() -> None:
    assert "sglang" in error_text(**{"sglang": {1: 2}}).partition(":")[0]


@pytest.mark.parametrize(
    "key",
    [
        "algorithm.loss.clip_eps",
        "algorithm.loss.clip_eps_high",
        "rollout.temperature",
        "reward.timeout_s",
    ],
)
def test_nan_is_rejected(key: str) -> None:
    assert error_text(**{key: float("nan")}).startswith(f"{key} = nan: expected ")


@pytest.mark.parametrize(
    ("key", "value"),
    [("algorithm.reward_shaping.bias", float("nan")), ("run.no_progress_timeout_s", float("inf"))],
)
def test_unbounded_setting_must_still_be_finite(key: str, value: float) -> None:
    assert error_text(**{key: value}).startswith(key)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configurations_load_and_survive_a_dump(path: Path, tmp_path: Path) -> None:
    settings = load.load(path)
    assert load_text(tmp_path, load.dump(settings)) == settings
