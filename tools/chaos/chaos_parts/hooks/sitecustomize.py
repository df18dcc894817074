"""Python imports this at start-up in every process of a chaos job.

While the flag `nan` exists, the trainer's next loss is NaN. The product's code is not changed: its
function is wrapped when it is imported.
"""

import importlib.abc
import importlib.machinery
import os
import sys
from pathlib import Path

TARGET = "megatron_async_rl.trainer.algorithms.loss"


class _WrapLoss(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != TARGET:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        loaded = spec.loader.exec_module

        def exec_module(module):
            loaded(module)
            policy_loss = module.policy_loss

            def poisoned(*arguments, **options):
                loss, metrics = policy_loss(*arguments, **options)
                try:
                    (Path(os.environ["CHAOS_FOLDER"]) / "nan").unlink()
                except FileNotFoundError:
                    return loss, metrics
                return loss * float("nan"), metrics

            module.policy_loss = poisoned

        spec.loader.exec_module = exec_module
        return spec


if "CHAOS_FOLDER" in os.environ and "megatron_async_rl.trainer" in sys.orig_argv:
    sys.meta_path.insert(0, _WrapLoss())
