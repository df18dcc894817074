"""run.dir/model_files.json: digests of model.path at the first start, for the next one.

The tokenizer and the chat template make the prompts, config.json the model that checkpoints are
loaded into, and with `algorithm.kl` the weights are the reference. Of a weight file, which may have
many gigabytes, the header and some evenly spaced blocks are digested.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from megatron_async_rl.config.config import Config
from megatron_async_rl.storage import files

MODEL_FILE = "model_files.json"
NUM_BLOCKS = 32
BLOCK_BYTES = 1 << 16
NUM_READERS = 16  # on a network disk a model of hundreds of files takes minutes one by one
_PATTERNS = (  # no others: an editor leaves copies such as tokenizer_config.json.bak
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "tokenizer.model", "special_tokens_map.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "additional_chat_templates/*.jinja",
)  # fmt: skip


def record(run_dir: Path, config: Config) -> None:
    """Keeps the digests of model.path in the run, for `changed` at its next start.

    Does nothing if the run has them: a start that continues it has compared them.
    """
    if (run_dir / MODEL_FILE).exists():
        return
    encoded = msgspec.json.format(msgspec.json.encode(_digests(config)))
    files.write_atomic(run_dir / MODEL_FILE, encoded)


def changed(run_dir: Path, config: Config) -> str:
    """Returns which file of model.path has changed since `record`, "" if none has.

    Raises DataError if the recorded digests are damaged.
    """
    if not (run_dir / MODEL_FILE).exists():
        return ""
    recorded, found = read(run_dir), _digests(config)
    for name in sorted(recorded.keys() | found.keys()):
        if recorded.get(name) != found.get(name):
            return (
                f"model.path = {config.model.path}: {name} is not the file with which the run in "
                f"{run_dir} was started; restore it, choose another run.dir, or start over with "
                "--from-scratch"
            )
    return ""


def read(run_dir: Path) -> dict[str, str]:
    """Returns name -> digest, {} if nothing was recorded. Raises DataError."""
    lost = "the proof that the model has not changed since the run was started"
    return files.read_digests(
        run_dir / MODEL_FILE, lost, "delete it to continue without this proof"
    )


def _digests(config: Config) -> dict[str, str]:
    """Returns name -> digest of the files that a run depends on."""
    folder = Path(config.model.path)
    small = {path for pattern in _PATTERNS for path in folder.glob(pattern) if path.is_file()}
    found = {path.relative_to(folder).as_posix(): files.digest(path) for path in small}
    weights = [] if config.model.random_init else list(folder.glob("*.safetensors"))
    with ThreadPoolExecutor(NUM_READERS) as readers:
        digests = readers.map(_sampled_digest, weights)
        return found | {path.name: digest for path, digest in zip(weights, digests, strict=True)}


def _sampled_digest(path: Path) -> str:
    """Returns the sha256 of a file's size and of blocks from its begin to its end."""
    size = path.stat().st_size
    digest = hashlib.sha256(f"{size} ".encode())
    with path.open("rb") as file:
        for number in range(NUM_BLOCKS):
            file.seek(max(0, size - BLOCK_BYTES) * number // (NUM_BLOCKS - 1))
            digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()
