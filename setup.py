"""Installs the package, with the folder patches/ as megatron_async_rl/_patches.

The engine (SGLang) has a separate environment: tools/setup_env.sh. `apex` and `zmq` on PyPI are
other projects: NVIDIA's Apex is used when it is installed, and the package of ZeroMQ is pyzmq.
"""

from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
patches = [
    p for p in sorted((here / "patches").rglob("*")) if p.is_dir() and "__pycache__" not in p.parts
]
patch_packages = {
    ".".join(["megatron_async_rl._patches", *p.relative_to(here / "patches").parts]): str(
        p.relative_to(here)
    )
    for p in [here / "patches", *patches]
}

setup(
    name="megatron_async_rl",
    version="0.1.0",
    description=(
        "Fully asynchronous reinforcement learning for language models, "
        "as an extension of Megatron-Core"
    ),
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    entry_points={"console_scripts": ["megatron-async-rl = megatron_async_rl.__main__:main"]},
    packages=[
        *find_packages(include=["megatron_async_rl", "megatron_async_rl.*"]),
        *patch_packages,
    ],
    package_dir=patch_packages,
    package_data={package: ["*.md"] for package in patch_packages},
    install_requires=[
        "torch>=2.11",
        "megatron-core>=0.16.1",
        "pyzmq>=27",
        "msgspec>=0.19",
        "PyYAML>=6",
        "aiohttp>=3.9",
        "rich>=13",
        "tensorboard>=2.16",
        "transformers>=5",  # for tokenizers and safetensors, and to check exports
        "math-verify[antlr4_13_2]>=0.8",
        "mpmath>=1.3",  # of math-verify too
        "pebble>=5",
        "pyarrow>=15",
    ],
    extras_require={
        "test": [
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "mypy",
            "types-PyYAML",
            "psutil",
            "reasoning-gym",
            "openai",
            "anthropic",
            "smolagents",
            "schemathesis",
        ],
        "reasoning_gym": ["reasoning-gym"],
        "gpu": ["transformer-engine[pytorch]"],
        "wandb": ["wandb>=0.19"],  # monitor.loggers
        "mlflow": ["mlflow-skinny>=3", "sqlalchemy>=2", "alembic>=1.13"],
    },
)
