"""The settings that the installed SGLang and Megatron-Core have, for the rules of passed_on.py.

Each library is queried in a process of its own Python, because its import takes seconds and this
package imports neither. The result is kept in the cache folder under the library's version.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from megatron_async_rl import processes
from megatron_async_rl.config.passed_on import KnownSetting, KnownSettings
from megatron_async_rl.engine_env import cache_dir
from megatron_async_rl.errors import Error
from megatron_async_rl.storage import files

TIMEOUT_S = 120.0

# Prints the version and the time of the installation.
_ENGINE_VERSION = """
import importlib.metadata, importlib.util, os
print(importlib.metadata.version("sglang"))
print(os.stat(importlib.util.find_spec("sglang").origin).st_mtime_ns)
"""
# Prints every option of SGLang's command line: the server is started by it.
_ENGINE_SETTINGS = """
import argparse, json
from sglang.srt.server_args import ServerArgs

def types(action):
    if action.nargs == 0:
        return ["bool"]
    name = {int: "int", float: "float", str: "str", None: "str"}.get(action.type)
    if name is None:
        return []
    return [name] + {"+": ["list"], "*": ["list"], "?": ["bool"]}.get(action.nargs, [])

parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
settings = {}
for action in parser._actions:
    if isinstance(action, argparse._HelpAction):
        continue
    keys = [option[2:].replace("-", "_") for option in action.option_strings if option[:2] == "--"]
    for key in keys:
        alias_of = action.dest if action.dest in keys and key != action.dest else ""
        choices = [choice for choice in action.choices or []]
        settings[key] = {"types": types(action), "choices": choices, "alias_of": alias_of}
print(json.dumps(settings))
"""

Say = Callable[[str], None]  # shows a line before something that takes seconds


def engine_settings(python: Path, say: Say = lambda text: None) -> KnownSettings:
    """Returns the settings of the SGLang of that Python. Raises Error if it cannot be queried."""
    version = _output([str(python), "-I", "-c", _ENGINE_VERSION])
    library = f"SGLang {version.split()[0]}"
    command = [str(python), "-I", "-c", _ENGINE_SETTINGS]
    return _cached(library, f"{python} {version}", command, say)


def trainer_settings(say: Say = lambda text: None) -> KnownSettings:
    """Returns the settings that the trainer passes to Megatron-Core. Raises Error likewise."""
    try:
        library = f"megatron-core {importlib.metadata.version('megatron-core')}"
    except importlib.metadata.PackageNotFoundError as e:
        raise Error(
            f"megatron-core is not installed in {sys.executable}", "run bash tools/setup_env.sh"
        ) from e
    module = "megatron_async_rl.trainer.known_settings"
    source = Path(__file__).with_name("trainer") / "model" / "megatron_config.py"
    identity = f"{sys.executable} {library} {files.digest(source)}"
    return _cached(library, identity, [sys.executable, "-m", module], say)


def _cached(library: str, identity: str, command: list[str], say: Say) -> KnownSettings:
    """Returns the settings that `command` prints, or printed when it was last run."""
    key = hashlib.sha256(" ".join([identity, *command]).encode()).hexdigest()[:16]
    path = cache_dir() / f"settings-{key}.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=KnownSettings)
    except (OSError, msgspec.DecodeError):
        say(f"asking {library} for its settings (once for each version, some seconds)")
    last_line = _output(command).strip().rpartition("\n")[2]
    try:
        settings = msgspec.json.decode(last_line, type=dict[str, KnownSetting])
    except msgspec.DecodeError as e:
        raise Error(
            f"{library} gave no list of its settings: {e}", "install a supported version"
        ) from e
    known = KnownSettings(library, settings)
    with contextlib.suppress(OSError):  # queried again the next time
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomic(path, msgspec.json.encode(known))
    return known


def _output(command: list[str]) -> str:
    env = os.environ | {"PYTHONPATH": processes.python_path()}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env=env
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        raise Error(f"{command[0]} does not run: {e}", "install the environment again") from e
    if done.returncode:
        raise Error((done.stderr.strip().splitlines() or ["no output"])[-1])
    return done.stdout
