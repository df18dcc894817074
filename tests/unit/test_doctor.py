import io
import json
import os
import re
import socket
import tempfile
from pathlib import Path

import pytest
from rich.console import Console
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from megatron_async_rl.__main__ import main
from megatron_async_rl.cli import doctor
from megatron_async_rl.cli.doctor import checks
from megatron_async_rl.config.config import Config
from megatron_async_rl.config.load import dump, from_tree
from megatron_async_rl.engine_env import ENGINE_VARIABLE, engine_python
from megatron_async_rl.errors import ConfigError, DataError
from megatron_async_rl.launcher.checks.disk import needed_bytes
from megatron_async_rl.launcher.preflight import preflight
from megatron_async_rl.model.config_json import HfConfig
from megatron_async_rl.model.shape import map_parameter, parameter_names

MODEL = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
}


ENGINE_SETTINGS = {
    "device": {"types": ["str"]},
    "dtype": {"types": ["str"]},
    "tp_size": {"types": ["int"]},
    "tensor_parallel_size": {"types": ["int"], "alias_of": "tp_size"},
    "port": {"types": ["int"]},
    "mem_fraction_static": {"types": ["float"]},
}


def make_python(path: Path, version: str = "0.5.21") -> Path:
    """Writes a fake interpreter of an engine environment, which prints the same as SGLang's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = json.dumps(ENGINE_SETTINGS)
    path.write_text(
        f"#!/bin/sh\ncase \"$3\" in *ServerArgs*) echo '{settings}';; *) echo {version};; esac\n"
    )
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the cache of all tests here: Megatron-Core is asked for its settings once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets up a host with an engine, and a valid model and datasets in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MEGATRON_ASYNC_RL_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv(ENGINE_VARIABLE, str(make_python(tmp_path / "engine" / "bin" / "python")))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    write_model()
    rows = [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(5)]
    for name in ("train.jsonl", "eval.jsonl"):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_model(**changes: object) -> None:
    folder = Path("model")
    folder.mkdir(exist_ok=True)
    vocabulary = {character: number for number, character in enumerate("e0123456789+=")}
    tokenizer = Backend(models.WordLevel(vocabulary, unk_token="e"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text('{"eos_token_id": 0}')
    (folder / "config.json").write_text(json.dumps(MODEL | changes))
    write_weights(folder / "model.safetensors", model_tensors())


def model_tensors() -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the model's tensors."""
    shape = HfConfig("model").shape()
    names = parameter_names(shape)
    return {hf: size for name in names for hf, size in map_parameter(name, shape).pieces}


def write_weights(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str = "BF16") -> None:
    """Writes a safetensors file with tensors of 4 bytes, whatever their shapes."""
    header = json.dumps({
        name: {"dtype": dtype, "shape": size, "data_offsets": [4 * n, 4 * n + 4]}
        for n, (name, size) in enumerate(shapes.items())
    })  # fmt: skip
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(4 * len(shapes)))


def make_config(**changes: dict[str, object]) -> Config:
    tree: dict[str, dict[str, object]] = {
        "run": {"dir": "run", "steps": 10},
        "model": {"path": "model", "context_tokens": 64},
        "data": {"train": "train.jsonl"},
        "evaluation": {"sets": {"held_out": {"path": "eval.jsonl"}}},
        "rollout": {"max_new_tokens": 32},
        "algorithm": {"prompts_per_step": 1, "samples_per_prompt": 2},
    }
    for section, values in changes.items():
        tree[section] = tree.get(section, {}) | values
    return from_tree(tree)


def result(name: str, config: Config | None = None) -> doctor.Check:
    return next(check for check in checks(config) if check.name == name)


def install(folder: Path, name: str, **metadata: str) -> None:
    """Writes the metadata that pip leaves for a distribution."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    fields = {"Metadata-Version": "2.1", "Name": name, "Version": "1.0"} | metadata
    (info / "METADATA").write_text("".join(f"{key}: {value}\n" for key, value in fields.items()))


def test_valid_configuration_passes() -> None:
    preflight(make_config())
    preflight(
        make_config(megatron={"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2})
    )


def test_every_failing_check_has_a_remedy() -> None:
    Path("model/config.json").unlink()
    failing = [check for check in checks(make_config()) if not check.ok]
    assert "model" in [check.name for check in failing]
    assert all(check.detail and check.remedy for check in failing)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (
            {"model": {"path": "none"}},
            DataError,
            [
                "model.path = none: no such folder in /",
                "hf download OWNER/NAME --local-dir none; the examples",
            ],
        ),
        (
            {"data": {"train": "none.jsonl"}},
            DataError,
            ["data.train = none.jsonl cannot be read: No such file or directory in /", "set data"],
        ),
        (
            {"evaluation": {"sets": {"held_out": {"path": "none.jsonl"}}}},
            DataError,
            ["evaluation.sets.held_out.path = none.jsonl"],
        ),
        (
            {"megatron": {"tensor_model_parallel_size": 3}},
            ConfigError,
            [
                "megatron.tensor_model_parallel_size = 3 does not divide",
                "the model's num_attention_heads = 4",
                "one of 1, 2",
            ],
        ),
        (
            {"megatron": {"tensor_model_parallel_size": 4}},
            ConfigError,
            [
                "megatron.tensor_model_parallel_size = 4 does not divide",
                "the model's num_key_value_heads = 2",
                "one of 1, 2",
            ],
        ),
        (
            {"megatron": {"pipeline_model_parallel_size": 5}},
            ConfigError,
            [
                "megatron.pipeline_model_parallel_size = 5 is more than",
                "the model's num_hidden_layers = 4",
                "lower it",
            ],
        ),
        (
            {"megatron": {"expert_model_parallel_size": 2}},
            ConfigError,
            ["the model has no experts"],
        ),
        ({"sglang": {"tp_size": 3}}, ConfigError, ["sglang.tp_size = 3", "one of 1, 2, 4"]),
        (
            {"model": {"context_tokens": 512}},
            ConfigError,
            ["model.context_tokens = 512", "at most 256"],
        ),
    ],
)
def test_preflight_names_key_value_rule_and_remedy(
    changes: dict, error: type[Exception], words: list[str]
) -> None:
    with pytest.raises(error) as caught:
        preflight(make_config(**changes))
    for word in words:
        assert word in str(caught.value)


def test_preflight_reports_all_problems_at_once() -> None:
    evaluation = {"sets": {"held_out": {"path": "none"}}}
    with pytest.raises(
        ConfigError, match=r"(?s)2 problems.*megatron\.tensor.*held_out.path = none"
    ):
        preflight(make_config(megatron={"tensor_model_parallel_size": 3}, evaluation=evaluation))


def test_architecture_without_weight_table_is_rejected() -> None:
    Path("model/config.json").write_text(json.dumps(MODEL | {"architectures": ["GPT2LMHeadModel"]}))
    with pytest.raises(
        DataError,
        match="architecture GPT2LMHeadModel is not supported; "
        "use a model of one of LlamaForCausalLM",
    ):
        preflight(make_config())


def test_incomplete_model_download_is_detected() -> None:
    index = {
        "weight_map": {
            "a": "model-00001-of-00002.safetensors",
            "b": "model-00002-of-00002.safetensors",
        }
    }
    Path("model/model.safetensors.index.json").write_text(json.dumps(index))
    Path("model/model-00001-of-00002.safetensors").write_text("")
    Path("model/tokenizer.json").unlink()
    with pytest.raises(
        DataError, match=r"tokenizer\.json, model-00002-of-00002\.safetensors not in it"
    ):
        preflight(make_config())


def test_weights_that_the_index_does_not_name_are_not_looked_at() -> None:
    listed = {"weight_map": {"any": "model.safetensors"}}
    Path("model/model.safetensors.index.json").write_text(json.dumps(listed))
    Path("model/left-over.safetensors").write_bytes(b"of another download")
    preflight(make_config())


@pytest.mark.parametrize(("content", "problem"), [
    (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of git lfs.*; git lfs pull"),
    (b"", "cut off: it has 0 bytes"),
    (b"<html>not found</html>", "cut off: it has 22 bytes"),
    (b"\x02" + bytes(7) + b"[]", "cut off: it has 10 bytes"),
    (b"!" + bytes(7) + b'{"a": {"data_offsets": [0, "1"]}}', "cut off: it has 41 bytes"),
    (None, r"cut off: it has ([\d,]+) bytes of \d.*; hf download"),
])  # fmt: skip
def test_weights_that_are_not_whole_are_detected(content: bytes | None, problem: str) -> None:
    path = Path("model/model.safetensors")
    path.write_bytes(path.read_bytes()[:-4] if content is None else content)
    with pytest.raises(DataError, match=rf"model\.safetensors .*{problem}"):
        preflight(make_config())
    preflight(make_config(model={"random_init": True}))


def test_quantized_weights_without_a_mark_in_config_json_are_detected() -> None:
    write_weights(Path("model/model.safetensors"), model_tensors(), "F8_E4M3")
    with pytest.raises(
        DataError, match=r"embed_tokens\.weight is stored as F8_E4M3, and quantized weights"
    ):
        preflight(make_config())
    preflight(make_config(run={"mode": "rollout_only"}))


def test_servers_alone_may_have_quantized_weights_in_files_of_any_name() -> None:
    """GPTQ and AWQ store a layer's weight as qweight, qzeros and scales."""
    config = make_config(run={"mode": "rollout_only"})
    Path("model/model.safetensors").rename("model/gptq_model-4bit.safetensors")
    preflight(config)
    write_weights(Path("model/gptq_model-4bit.safetensors"), {"model.norm.weight": (64,)})
    with pytest.raises(DataError, match="no tensor"):
        preflight(config)
    Path("model/quantize_config.json").write_text('{"bits": 4}')
    preflight(config)


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        (
            {"lm_head.weight": None},
            r"no tensor lm_head\.weight, .*; set tie_word_embeddings to true",
        ),
        ({"model.norm.weight": None}, r"no tensor model\.norm\.weight, .*; download the model"),
        ({"model.norm.weight": (3,)}, r"model\.norm\.weight has shape \(3,\), but \(\d+,\) acc"),
    ],
)
def test_weights_that_do_not_fit_config_json_are_detected(
    changed: dict[str, tuple[int, ...] | None], problem: str
) -> None:
    tensors = model_tensors() | changed
    shapes = {name: size for name, size in tensors.items() if size is not None}
    write_weights(Path("model/model.safetensors"), shapes)
    with pytest.raises(DataError, match=problem):
        preflight(make_config())
    preflight(make_config(model={"random_init": True}))


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        (["pytorch_model.bin"], r"\*\.safetensors not in it; convert the \.bin files: Auto"),
        (["training_args.bin"], r"\*\.safetensors not in it; .*hf download"),
        (["weights.safetensors"], r"model\.safetensors not in it; .*hf download"),
        (
            ["a-1.safetensors", "a-2.safetensors"],
            r"model\.safetensors\.index\.json not in it; hf d",
        ),
    ],
)
def test_weights_under_other_names_are_detected(files: list[str], problem: str) -> None:
    weights = Path("model/model.safetensors").rename("weights")
    for name in files:
        Path("model", name).write_bytes(weights.read_bytes())
    with pytest.raises(DataError, match=problem):
        preflight(make_config())


def test_tokenizer_of_a_larger_model_is_detected() -> None:
    write_model(vocab_size=3)
    problems = [check.detail for check in checks(make_config()) if check.name == "dataset train"]
    assert "row 1: token id" in problems[0] and "vocabulary of 3" in problems[0]


def test_config_json_of_another_model_type_is_rejected() -> None:
    Path("model/config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(DataError, match="num_attention_heads = None, expected an integer"):
        preflight(make_config())


def test_random_init_needs_config_json_and_the_tokenizer_alone() -> None:
    Path("model/model.safetensors").unlink()
    with pytest.raises(DataError, match=r"\*\.safetensors not in it"):
        preflight(make_config())
    preflight(make_config(model={"random_init": True}))


def test_model_that_megatron_computes_differently_is_rejected() -> None:
    write_model(use_sliding_window=True)
    with pytest.raises(DataError, match="use_sliding_window = True"):
        preflight(make_config())
    preflight(make_config(run={"mode": "rollout_only"}))


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ('{"prompt": "1+1="}', "no `answer`"),
        ('{"prompt": "1+1=", "answer": ""}', "no `answer`"),
        ('{"answer": "2"}', "no `prompt`"),
        ("[1]", "not a JSON object"),
        ("{", "not JSON"),
    ],
)
def test_bad_dataset_row_error_names_file_and_row(row: str, problem: str) -> None:
    with Path("train.jsonl").open("a") as file:
        file.write("\n" + row + "\n")
    with pytest.raises(DataError, match=f"data.train = train.jsonl, row 7: {re.escape(problem)}"):
        preflight(make_config())


def test_missing_column_of_a_source_is_rejected() -> None:
    source = {"path": "train.jsonl", "fields": {"prompt": "q", "answer": "answer"}}
    with pytest.raises(
        DataError,
        match=r"data.train\[0\].path = train.jsonl, row 1: no column `q`; the columns are: ",
    ):
        preflight(make_config(data={"train": [source]}))


def test_empty_dataset_is_rejected() -> None:
    Path("eval.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"held_out.path = eval.jsonl has no rows"):
        preflight(make_config())


def test_answer_is_required_only_if_the_reward_needs_it() -> None:
    Path("train.jsonl").write_text('{"prompt": "write a poem"}\n')
    Path("poems.py").write_text("def score(prompt, response, row):\n    return 1.0\n")
    preflight(make_config(reward={"function": "poems:score"}))


def test_engine_port_in_use_is_rejected() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(
            ConfigError, match=rf"sglang.port = {port} cannot be bound.*remove sglang.port"
        ):
            preflight(make_config(sglang={"port": port}))


def test_missing_engine_error_gives_the_setup_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(ENGINE_VARIABLE)
    with pytest.raises(
        ConfigError, match=r"no Python environment with SGLang found; bash tools/setup_env.sh"
    ):
        preflight(make_config())


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo 0.4.9", "SGLang 0.4.9, supported is >=0.5.16"),
        ("echo lost >&2; exit 1", "has no SGLang: lost"),
    ],
)
def test_unsupported_engine_is_rejected(script: str, words: str) -> None:
    Path("engine/bin/python").write_text(f"#!/bin/sh\n{script}\n")
    with pytest.raises(ConfigError, match=words):
        preflight(make_config())


def test_layers_that_do_not_fit_the_pipeline_are_one_problem() -> None:
    config = make_config(megatron={"pipeline_model_parallel_size": 5})
    failed = [check.name for check in checks(config) if "pipeline_model_parallel" in check.detail]
    assert not config.on_cpu and failed == ["trainer layout"]


def test_layers_of_unequal_pipeline_stages_are_shown() -> None:
    config = make_config(megatron={"pipeline_model_parallel_size": 3})
    assert "pipeline 3 (layers 1, 2, 1)" in result("trainer layout", config).detail


def test_engine_too_old_for_a_setting_is_rejected() -> None:
    make_python(Path("engine/bin/python"), version="0.5.20")
    assert result("engine", make_config()).ok
    old = result("engine", make_config(weights={"quantization": "fp8_block"}))
    assert "weights.quantization = fp8_block needs SGLang 0.5.21" in old.detail
    assert "0.5.20" in old.detail and "remove weights.quantization" in old.remedy


def test_engine_variable_without_interpreter_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENGINE_VARIABLE, "/none/python")
    with pytest.raises(ConfigError, match=f"/none/python does not run.*{ENGINE_VARIABLE}"):
        preflight(make_config())


def test_newest_complete_engine_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENGINE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert engine_python() is None
    cache = tmp_path / "cache" / "megatron_async_rl"
    for age, name in enumerate(("engine-unfinished", "engine-a", "engine-b")):
        make_python(cache / name / "bin" / "python")
        if name != "engine-unfinished":
            (cache / name / ".complete").touch()
            os.utime(cache / name / ".complete", (1000 - age, 1000 - age))
    assert engine_python() == cache / "engine-a" / "bin" / "python"
    monkeypatch.setenv("MEGATRON_ASYNC_RL_CACHE", str(tmp_path / "elsewhere"))
    assert engine_python() is None
    elsewhere = make_python(tmp_path / "elsewhere" / "engine-x" / "bin" / "python")
    (tmp_path / "elsewhere" / "engine-x" / ".complete").touch()
    assert engine_python() == elsewhere


def test_foreign_apex_package_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(
        tmp_path / "trap", "apex", Summary="Pyramid toolkit to add Velruse, Flash Messages, CSRF"
    )
    install(tmp_path / "good", "apex", Summary="PyTorch Extensions written by NVIDIA")
    with monkeypatch.context() as context:
        context.syspath_prepend(str(tmp_path / "trap"))
        assert not result("apex").ok and result("apex").remedy == "pip uninstall apex"
    monkeypatch.syspath_prepend(str(tmp_path / "good"))
    assert result("apex").ok


def test_zmq_shim_package_is_reported_and_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "shim", "zmq")
    monkeypatch.syspath_prepend(str(tmp_path / "shim"))
    assert result("pyzmq").ok and "shim" in result("pyzmq").detail


def test_old_library_error_gives_the_supported_range(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "old", "torch")
    monkeypatch.syspath_prepend(str(tmp_path / "old"))
    assert not result("torch").ok and "1.0, supported is" in result("torch").detail


def test_gpu_host_requires_the_gpu_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    name = "NVIDIA H100 80GB HBM3, 81559 MiB"
    smi.write_text(f"#!/bin/sh\ncase $1 in *index*) echo 0;; *) echo '{name}';; esac\n")
    smi.chmod(0o755)
    install(tmp_path / "old", "megatron_core", Version="0.16.1")
    monkeypatch.syspath_prepend(str(tmp_path / "old"))
    monkeypatch.setenv("PATH", f"{smi.parent}:/usr/bin:/bin")
    assert result("devices").detail == "NVIDIA H100 80GB HBM3 (81559 MiB)"
    assert (
        not result("megatron-core").ok and "supported is ~=0.19.2" in result("megatron-core").detail
    )


@pytest.mark.parametrize("host", ["198.51.100.1", "no such host"])
def test_address_of_another_host_is_rejected_before_start(host: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"'{host}' is not an address of this host.*ip addr shows them"
    ):
        preflight(make_config(run={"host": host}))


def test_unwritable_run_folder_is_reported() -> None:
    Path("file").write_text("")
    check = result("run.dir", make_config(run={"dir": "file/run"}))
    assert not check.ok and "file is no folder" in check.detail


def test_folder_of_other_files_is_not_taken_for_a_run() -> None:
    Path("runs/model").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"run\.dir = .*/runs holds model, and no run; .* runs/f"):
        preflight(make_config(run={"dir": "runs/"}))
    Path("runs/keys").mkdir()  # as of a run
    assert result("run.dir", make_config(run={"dir": "runs"})).ok
    Path("empty").mkdir()
    assert result("run.dir", make_config(run={"dir": "empty"})).ok


def test_new_run_needs_space_for_its_lock_beside_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "job" / "run").mkdir(parents=True)  # as a scheduler makes it
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "job")  # for root
    config = make_config(run={"dir": "job/run"})
    check = result("run.dir", config)
    assert not check.ok and check.detail.endswith("/job cannot be written")
    (tmp_path / "job" / ".run.lock").write_text("")  # of an earlier start
    assert result("run.dir", config).ok


def test_doctor_prints_every_check_and_fails_if_one_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("run.yaml").write_text(dump(make_config()))
    out = io.StringIO()
    missing = [check.name for check in checks(make_config()) if not check.ok]
    assert doctor.run("run.yaml", [], Console(file=out, width=200)) == (1 if missing else 0)
    assert "SGLang 0.5.21" in out.getvalue() and "5 rows" in out.getvalue()
    monkeypatch.delenv(ENGINE_VARIABLE)
    out = io.StringIO()
    assert doctor.run("run.yaml", [], Console(file=out, width=200)) == 1
    assert "problem" in out.getvalue() and "engine" in out.getvalue().rpartition("problem")[2]


def test_doctor_reports_an_unreadable_configuration() -> None:
    out = io.StringIO()
    assert doctor.run("none.yaml", [], Console(file=out, width=200)) == 1
    assert "cannot read the configuration none.yaml" in out.getvalue()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sglang": {"mem_fraction": 0.3}}, ["sglang.mem_fraction = 0.3", "mem_fraction_static?"]),
        ({"sglang": {"tensor_parallel_size": 2}}, ["set sglang.tp_size instead"]),
        ({"sglang": {"mem_fraction_static": "much"}}, ["'much': SGLang 0.5.21 expects float"]),
        ({"megatron": {"learning_rate": 1e-6}}, ["megatron.learning_rate", "megatron.lr?"]),
        ({"megatron": {"clip_gard": 1.0}}, ["megatron.clip_gard", "megatron.clip_grad?"]),
        ({"megatron": {"lr": "much"}}, ["megatron.lr = 'much'", "expects float"]),
    ],
)
def test_key_that_the_installed_version_does_not_have_is_refused_before_the_start(
    changes: dict, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        preflight(make_config(**changes))
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("module", "setting", "words"),
    [
        (None, {"reward": {"function": "mine:f"}}, ["reward.function = 'mine:f'", "No module"]),
        ("", {"reward": {"function": "mine:f"}}, ["has no attribute 'f'", "PYTHONPATH"]),
        ("def f(a): pass", {"reward": {"function": "mine:f"}}, ["parameters (a)"]),
        ("f = 3", {"reward": {"function": "mine:f"}}, ["it is a int"]),
        (
            "async def f(path, source): pass",
            {"data": {"reader": "mine:f"}},
            ["it is async"],
        ),
        ("1 / 0", {"rollout": {"workflow": "mine:W"}}, ["ZeroDivisionError", "mine.py, line 1"]),
        ("class W: pass", {"rollout": {"workflow": "mine:W"}}, ["it has no method `run`"]),
        ("import os; os._exit(3)", {"reward": {"function": "mine:f"}}, ["ended: exit code 3"]),
        (
            "print('hello')\ndef f(prompt, response, row): pass",
            {"reward": {"function": "mine:f"}},
            [],
        ),
        (
            "import atexit; atexit.register(print, 'bye')\ndef f(prompt, response, row): pass",
            {"reward": {"function": "mine:f"}},
            [],
        ),
        (
            "def f(rewards, lengths, config): return rewards[0]",
            {"algorithm": {"advantage": {"estimator": "mine:f"}}},
            ["estimator = mine:f returned an array of shape", "; return an array of shape"],
        ),
        (
            "def f(rewards, lengths, config): return rewards * config.options['scale']",
            {"algorithm": {"advantage": {"estimator": "mine:f"}}},
            [
                "estimator = mine:f failed: KeyError: 'scale' File",
                'mine.py", line 1, in f (in a trial with made-up',
            ],
        ),
        (
            "raise ValueError('two\\nlines')",
            {"reward": {"function": "mine:f"}},
            ["ValueError: two lines (", "mine.py, line 1"],
        ),
    ],
)
def test_hook_is_imported_before_the_start(
    module: str | None, setting: dict, words: list[str]
) -> None:
    if module is not None:
        Path("mine.py").write_text(module)
    if not words:
        return preflight(make_config(**setting))
    with pytest.raises(ConfigError) as caught:
        preflight(make_config(**setting))
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize("visible", ["-1", "", "0", "0,-1,1", "NoDevFiles"])
def test_too_few_visible_gpus_are_found_before_the_start(
    visible: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ConfigError, match=rf"needs 2 GPUs on this host, .* = '{visible}'"):
        preflight(make_config())
    preflight(make_config(), elsewhere=["rollout-0", "trainer"])
    preflight(make_config(sglang={"device": "cpu"}))


def test_doctor_accepts_a_login_node_of_a_cluster_with_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    sinfo = tmp_path / "bin" / "sinfo"
    sinfo.parent.mkdir()
    monkeypatch.setenv("PATH", f"{sinfo.parent}:/bin")
    for resources, ok in (("(null)", False), ("gpu:h100:8", True)):
        sinfo.write_text(f"#!/bin/sh\necho '{resources}'\n")
        sinfo.chmod(0o755)
        check = result("GPUs", make_config())
        assert check.ok == ok and "needs 2 GPUs on this host, which has 0" in check.detail


def test_program_of_an_agent_is_found_before_the_start() -> None:
    with pytest.raises(ConfigError, match=r"agent_command = absent agent\.js: there is no pr"):
        preflight(make_config(rollout={"agent_command": "absent agent.js"}))
    preflight(make_config(rollout={"agent_command": "absent agent.js"}), elsewhere=["rollout-0"])
    assert result("agent", make_config(rollout={"agent_command": "sh -c true"})).ok


def test_folder_too_deep_for_sockets_is_found_before_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", f"/{'x' * 59}")
    with pytest.raises(ConfigError, match=r"TMPDIR = /x+ has 60 bytes.*set TMPDIR to a short path"):
        preflight(make_config())


def test_every_hook_that_cannot_be_loaded_is_named() -> None:
    changes = {"reward": {"function": "none:f"}, "rollout": {"workflow": "json:dumps"}}
    with pytest.raises(
        ConfigError, match=r"reward\.function = 'none:f'.*rollout\.workflow = 'json"
    ):
        preflight(make_config(**changes))


def test_disk_too_small_for_the_checkpoints_is_found_before_the_start() -> None:
    config = make_config(
        run={"steps": 1000, "export_every": 1},
        checkpoint={"keep": 100},
        trainer={"precision": "fp32"},
    )
    sizes = needed_bytes(config)
    parameters = 64 * 32 * 2 + 64 + 4 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 96 * 3 + 2 * 64 + 2 * 16)
    assert sizes["for 100 checkpoints (checkpoint.keep = 100)"] == 100 * 16 * parameters
    assert sizes["for 1001 exported policies"] == 1001 * 4 * parameters
    write_model(hidden_size=1 << 22, intermediate_size=1 << 22, head_dim=16)
    with pytest.raises(ConfigError, match=r"GiB free, .* GiB needed .*checkpoint.keep"):
        preflight(config)


@pytest.mark.parametrize(
    ("stored", "changes", "words"),
    [
        ("bfloat16", {"trainer": {"precision": "fp32"}}, "servers store bfloat16 .*sends float32"),
        ("float32", {}, "servers store float16 .*auto.*weights.dtype=float16"),
        ("bfloat16", {"sglang": {"dtype": "half"}}, "servers store float16 .*sends bfloat16"),
        ("bfloat16", {"weights": {"dtype": "bfloat16"}, "trainer": {"precision": "fp32"}}, ""),
        ("float32", {"sglang": {"dtype": "bfloat16"}}, ""),
    ],
)
def test_servers_must_store_the_type_that_the_trainer_sends(
    stored: str, changes: dict, words: str
) -> None:
    write_model(dtype=stored)
    if not words:
        return preflight(make_config(**changes))
    with pytest.raises(ConfigError, match=words):
        preflight(make_config(**changes))


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_quantized_model_is_refused_for_training(key: str) -> None:
    write_model(**{key: {"quant_method": "fp8"}})
    with pytest.raises(DataError, match=rf"{key} \(fp8\).*use the folder of the same model in bf"):
        preflight(make_config())
    preflight(make_config(run={"mode": "rollout_only"}))
    write_model()
    (Path("model") / "quantize_config.json").write_text("{}")
    with pytest.raises(DataError, match=r"quantize_config\.json is in it, and quantized weights"):
        preflight(make_config())


def test_doctor_takes_overrides_and_shows_settings_without_effect(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("run.yaml").write_text(dump(make_config()))
    assert main(["doctor", "run.yaml", "staleness.eta=2"]) == 1
    assert "did you mean staleness.max_staleness?" in " ".join(capsys.readouterr().out.split())
    main(["doctor", "run.yaml", "algorithm.advantage.gamma=0.9", "algorithm.loss.clip_eps=0.3"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "warning: algorithm.advantage.gamma = 0.9 has no effect: " in shown
    assert "clip_eps" not in shown
