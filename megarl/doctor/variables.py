"""Environment variables that contradict each other, the machine, or what megarl sets where they are unset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megarl.doctor.finding import Finding, Level, ok
from megarl.errors import ConfigError, MegarlError
from megarl.launchers.ray_address import check_ray_address, named_cluster
from megarl.parallel.environment import OVERRIDE, PlatformName, platform_name

_ON = ("1", "true", "yes", "on")


@dataclass(frozen=True)
class _Mistake:
    """A value of a variable that works against a run. platform: where it does, None for both."""

    name: str
    values: tuple[str, ...]
    why: str
    platform: PlatformName | None = None
    level: Level = "warn"


_MISTAKES = (
    _Mistake("VLLM_ENABLE_V1_MULTIPROCESSING", _ON, "weights are copied inside one process", None, "FAIL"),
    _Mistake("TORCHDYNAMO_DISABLE", ("0", "false", "no", "off"), "compiling costs a minute and gains nothing", "cpu"),
    _Mistake("TORCHDYNAMO_DISABLE", _ON, "vLLM's compiled kernels are off: generation is slower", "cuda"),
    _Mistake("TORCH_COMPILE_DISABLE", _ON, "vLLM's compiled kernels are off: generation is slower", "cuda"),
    _Mistake("CUDA_LAUNCH_BLOCKING", ("1",), "every kernel waits for the one before: for debugging only", "cuda"),
    _Mistake("NCCL_P2P_DISABLE", ("1",), "GPUs of a node talk through host memory", "cuda"),
    _Mistake("NCCL_IB_DISABLE", ("1",), "nodes talk over TCP instead of InfiniBand", "cuda"),
)


def check_platform(environ: Mapping[str, str]) -> tuple[Finding, PlatformName]:
    """Judge ``MEGARL_PLATFORM`` and return the platform that the other checks shall assume."""
    try:
        platform = platform_name(environ)
    except ConfigError as error:
        (problem,) = error.problems
        found = f"{problem.key}={problem.value!s} {problem.allowed}"
        rest = {name: value for name, value in environ.items() if name != OVERRIDE}
        return Finding("FAIL", "platform", found, problem.fix), platform_name(rest)
    asked = environ.get(OVERRIDE)
    if asked:
        return ok("platform", f"{platform}, as {OVERRIDE} says"), platform
    return ok("platform", f"{platform}, by torch's build and the driver; {OVERRIDE} is not set"), platform


def check_variables(environ: Mapping[str, str], platform: PlatformName, num_gpus: int, num_cores: int) -> list[Finding]:
    """Judge the variables that megarl, torch, vLLM and NCCL read. One line where none is wrong."""
    findings = [
        Finding(m.level, "variables", f"{m.name}={environ[m.name]}: {m.why}", f"unset {m.name}")
        for m in _MISTAKES
        if m.platform in (None, platform) and environ.get(m.name, "").lower() in m.values
    ]
    hidden = environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if hidden and environ.get(OVERRIDE) == "cuda":
        found = f"{OVERRIDE}=cuda, but CUDA_VISIBLE_DEVICES={environ['CUDA_VISIBLE_DEVICES']} hides all GPUs"
        findings.append(Finding("FAIL", "variables", found, "unset one of the two"))
    elif hidden and num_gpus and OVERRIDE not in environ:
        found = f"CUDA_VISIBLE_DEVICES={environ['CUDA_VISIBLE_DEVICES']} hides all {num_gpus} GPUs"
        findings.append(Finding("warn", "variables", found, f"unset it, or export {OVERRIDE}=cpu if that is meant"))
    connections = environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if platform == "cuda" and connections != "1":
        found = f"CUDA_DEVICE_MAX_CONNECTIONS={connections}: Megatron overlaps communication by launch order with 1"
        findings.append(Finding("warn", "variables", found, "unset it"))
    threads = environ.get("OMP_NUM_THREADS", "1")
    if platform == "cpu" and threads.isdigit() and int(threads) * 2 > max(num_cores, 2):
        found = f"OMP_NUM_THREADS={threads}: two ranks of so many threads share {num_cores} cores"
        findings.append(Finding("warn", "variables", found, "unset it: one thread a rank"))
    return findings or [ok("variables", "none contradicts another or the machine")]


def check_cluster(environ: Mapping[str, str]) -> list[Finding]:
    """Judge the Ray cluster that ``RAY_ADDRESS`` names; nothing to say where runs have a Ray of their own."""
    address = named_cluster(environ)
    if address is None:
        return []
    try:
        check_ray_address(environ)
    except MegarlError as error:
        return [Finding("FAIL", "ray cluster", f"no run can join {address}", str(error).rpartition("fix: ")[2])]
    return [ok("ray cluster", f"{address} answers")]
