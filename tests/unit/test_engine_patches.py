"""patches/sglang_startup changes modules of SGLang as a server imports them; here a stand-in's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from paths import ROOT

MODULES = {
    "sglang/srt/utils/weight_checker.py": "select_comparable_weight = lambda method: 'fp8'\n",
    "sglang/srt/model_loader/weight_utils.py": """
def initialize_dummy_weights(model, low=0.0, seed=1):
    for _, parameter in model.named_parameters():
        parameter.data.fill_(low + seed)
""",
}
PROGRAM = """
from sglang.srt.utils import weight_checker
from sglang.srt.model_loader.weight_utils import initialize_dummy_weights

class Parameter:
    def __init__(self):
        self.data, self.value = self, -1.0
    def fill_(self, value):
        self.value = value

class Model:
    weights = {name: Parameter() for name in ("mlp.weight", "attn.k_scale", "attn.v_scale")}
    def named_parameters(self):
        return self.weights.items()

assert weight_checker.select_comparable_weight("a method") is None
initialize_dummy_weights(Model(), 2.0, seed=3)
assert [p.value for p in Model.weights.values()] == [5.0, -1.0, -1.0]
"""


def test_startup_patches_change_the_modules_of_sglang(tmp_path: Path) -> None:
    for name, text in MODULES.items():
        path = tmp_path / name
        for folder in list(path.relative_to(tmp_path).parents)[:-1]:
            (tmp_path / folder).mkdir(exist_ok=True, parents=True)
            (tmp_path / folder / "__init__.py").touch()
        path.write_text(text)
    places = os.pathsep.join([str(ROOT / "patches" / "sglang_startup"), str(tmp_path)])
    env = {**os.environ, "PYTHONPATH": places}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
