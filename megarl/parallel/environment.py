"""Environment variables of the platform, and which platform this is. Imports the standard library only.

torch, vLLM and OpenMP read these variables once, at import: they are set before any of the three is imported,
so nothing here may import them, even to find out whether there is a GPU.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Literal, cast, get_args

from megarl.errors import ConfigError, Problem, ResourceError

PlatformName = Literal["cpu", "cuda"]
ProductsName = Literal["onednn", "torch"]

OVERRIDE = "MEGARL_PLATFORM"
PRODUCTS = "MEGARL_CPU_PRODUCTS"

GPU = "MEGARL_GPU"
"""The first GPU that ranks are to run on, as ``list_gpus`` names it, where it is on another machine."""

LOCAL_PLACE = "MEGARL_LOCAL_RANK"
"""A rank's number on its node, where LOCAL_RANK is that of its device among those that it sees."""

PASSED = ("NCCL_", "GLOO_", "UCX_", "HF_", "VLLM_", "NVTE_", "TORCH_", "PYTORCH_", "CUDA_DEVICE_MAX_CONNECTIONS")
_OF_A_NODE = ("VLLM_HOST_IP",)
_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")

_PROCESSOR = Path("/proc/cpuinfo")

_EVERYWHERE = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # Megatron overlaps communication by launch order, and warns without
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in the trainer's process: weights are copied in place
    "VLLM_LOGGING_LEVEL": "WARNING",  # at INFO every rank reports every engine setting
    "VLLM_NO_USAGE_STATS": "1",  # a training run phones nobody
}
_CUDA_ONLY = {
    # Transformer Engine multiplies float32 matrices in TF32, with 10 bits of mantissa, unless cuBLAS is told not to.
    "NVIDIA_TF32_OVERRIDE": "0",
}
_CPU_ONLY = {
    "OMP_NUM_THREADS": "1",  # ranks share the cores, and OpenMP's default is all cores for each of them
    "TORCHDYNAMO_DISABLE": "1",  # compiling takes over a minute at the first generation and gains nothing at CPU sizes
    # On CPU these warn a dozen times a rank, in every run, of what nobody can act on. Errors are shown.
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TORCH_LOGS": "-torch._library",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB a rank; vLLM's default is meant for one engine a machine
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # with several ranks on one NUMA node vLLM's own binding asserts
}


def platform_name(environ: Mapping[str, str] = os.environ) -> PlatformName:
    """Return the platform of this process without importing torch.

    ``MEGARL_PLATFORM`` decides if set. Otherwise it is ``cuda`` where torch is not a CPU build and the NVIDIA
    driver shows a GPU that ``CUDA_VISIBLE_DEVICES`` does not hide.

    Raises ConfigError if ``MEGARL_PLATFORM`` is neither ``cpu`` nor ``cuda``.
    """
    asked = environ.get(OVERRIDE, "")
    if asked:
        if asked not in get_args(PlatformName):
            fix = f"unset {OVERRIDE}, or set it to cpu or cuda"
            raise ConfigError([Problem(OVERRIDE, asked, "must be cpu or cuda", fix)])
        return cast(PlatformName, asked)
    if environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1") or _torch_is_cpu_build():
        return "cpu"
    return "cuda" if _driver_shows_gpu() else "cpu"


def check_platform(environ: Mapping[str, str] = os.environ) -> None:
    """Raise ResourceError where ``MEGARL_PLATFORM`` asks for cuda and there is no GPU: here, or where ranks will be."""
    if environ.get(OVERRIDE) == "cuda" and not environ.get(GPU) and not _driver_shows_gpu():
        raise ResourceError(
            f"{OVERRIDE}=cuda, but no NVIDIA driver shows a GPU on this machine (nvidia-smi -L lists none). fix: unset "
            f"{OVERRIDE} or set it to cpu, start the command on a node with a GPU, or install the driver; "
            "python -m megarl.doctor looks at it"
        )


def visible_devices(environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Return the names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES has them; none without any."""
    if names := environ.get("CUDA_VISIBLE_DEVICES"):
        return tuple(names.split(","))
    return tuple(map(str, range(sum(line.startswith("GPU ") for line in _nvidia_smi("-L").splitlines()))))


def list_gpus() -> str:
    """Return a line ``name, MiB`` of each GPU of this machine, as text; empty where no tool tells."""
    return _nvidia_smi("--query-gpu=name,memory.total", "--format=csv,noheader,nounits")


def products_name(environ: Mapping[str, str] = os.environ) -> ProductsName:
    """Return what multiplies float32 matrices on CPU: ``PRODUCTS`` if set, else what is faster on this processor.

    Raises ConfigError if ``PRODUCTS`` is neither ``onednn`` nor ``torch``.
    """
    asked = environ.get(PRODUCTS)
    if not asked:
        return faster_products(_PROCESSOR.read_text(encoding="utf-8") if _PROCESSOR.exists() else "")
    if asked not in get_args(ProductsName):
        fix = f"unset {PRODUCTS}, or set it to onednn or torch"
        raise ConfigError([Problem(PRODUCTS, asked, "must be onednn or torch", fix)])
    return cast(ProductsName, asked)


def faster_products(processor: str) -> ProductsName:
    """Return what multiplies float32 matrices faster on a processor, from its text in /proc/cpuinfo.

    By its maker and not by a measurement, so that a run that is repeated or resumed there computes the same. torch's
    MKL leaves AVX-512 unused on AMD's.
    """
    words = processor.split()
    return "onednn" if "AuthenticAMD" in words and "avx512f" in words else "torch"


def platform_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables that the platform's processes need before torch and vLLM are imported.

    A variable that is already set keeps its value. The result is complete: hand it to processes on other hosts.
    """
    # Of the process that asks: ranks on other hosts are told, and all compute alike.
    defaults = {OVERRIDE: platform_name(environ), **_EVERYWHERE}
    if defaults[OVERRIDE] == "cpu":
        defaults |= _CPU_ONLY | {PRODUCTS: products_name(environ)}
    else:
        defaults |= _CUDA_ONLY
    return {name: environ.get(name, value) for name, value in defaults.items()}


def passed_environment(names: Iterable[str], environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables that ranks on other nodes get from this process: those of PASSED, and those of ``names``.

    A name that isn't set is left out.
    """
    return {
        name: value
        for name, value in environ.items()
        if name in names or (name.startswith(PASSED) and name not in _OF_A_NODE) or name.lower() in _PROXIES
    }


def apply_environment() -> None:
    """Set the platform's variables in this process. Call before importing torch or vLLM."""
    os.environ.update(platform_environment())


def _torch_is_cpu_build() -> bool:
    # A laptop with a GPU and the CPU wheel of torch is a CPU machine to us.
    try:
        return metadata.version("torch").endswith("+cpu")
    except metadata.PackageNotFoundError:
        return False


def _driver_shows_gpu() -> bool:
    gpus = Path("/proc/driver/nvidia/gpus")
    if gpus.is_dir():
        return any(gpus.iterdir())
    # Under WSL the driver has no /proc entry, only the tool.
    return "GPU" in _nvidia_smi("-L")


def _nvidia_smi(*arguments: str) -> str:
    """Return the text that the driver's tool prints; an empty one where there is none, or it fails."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    done = subprocess.run([tool, *arguments], capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else ""
