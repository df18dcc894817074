"""Fixtures of more than one test module; their files are shared by a session and never changed."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing.util import Finalize
from pathlib import Path

import hypothesis
import pytest
from tiny_model import make_dataset, make_model
from whole_runs import RunInputs, make_run_inputs

from megatron_async_rl import processes

# The same examples each time, on a machine of any speed; --hypothesis-profile=random draws others.
for name, repeats in (("suite", True), ("random", False)):
    hypothesis.settings.register_profile(
        name,
        deadline=None,
        derandomize=repeats,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
hypothesis.settings.load_profile("suite")


def pytest_collection_finish() -> None:
    """Gives torch one thread here: others of OpenMP would wait busily on cores that are shared."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Lets each test draw the same arrays, whichever tests its worker ran before.

    Python's own generator is left alone: zmq draws ports from it.
    """
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def temporary_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Removes the temporary files of all processes that tests start, also of those they kill."""
    tmp_path_factory.getbasetemp()  # stays where it is
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        folder = stack.enter_context(processes.temporary_folder())
        # at exit, behind the finalizer of multiprocessing that removes its own folder in it (-100)
        Finalize(None, stack.pop_all().close, exitpriority=-200)
        folder.chmod(0o711)  # tests of the sandbox run as another user
        patch.setenv("TMPDIR", str(folder))
        patch.setattr(tempfile, "tempdir", str(folder))
        yield


@pytest.fixture(scope="session")
def model_and_dataset(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Returns a model folder and a training set: all files that a controller reads at start-up."""
    folder = tmp_path_factory.mktemp("controller_inputs")
    return make_model(folder / "model"), make_dataset(folder / "train.jsonl", 20)


@pytest.fixture(scope="session")
def run_inputs(tmp_path_factory: pytest.TempPathFactory) -> RunInputs:
    """Returns a model folder, a training set and an evaluation set for whole runs."""
    return make_run_inputs(tmp_path_factory.mktemp("run_inputs"))
