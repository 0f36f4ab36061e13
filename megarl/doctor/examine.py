"""All that the doctor looks at on this machine, in the order in which it is told."""

from __future__ import annotations

import os
import platform as host
import resource
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import megarl
from megarl.doctor.accelerator import (
    COMPANIONS,
    Gpu,
    check_apex,
    check_companions,
    check_flash_attention,
    check_gpus,
    check_nccl,
    check_torch,
    check_transformer_engine,
    parse_gpus,
)
from megarl.doctor.finding import Finding
from megarl.doctor.limits import (
    PORTS,
    check_cores,
    check_disk,
    check_memory,
    check_open_files,
    check_ports,
    check_processes,
    check_segments,
    check_shared_memory,
)
from megarl.doctor.machine import (
    busy_ports,
    folder_of,
    group_limit,
    hub_cache,
    is_importable,
    mapped_names,
    nearest_existing,
    read_build,
    read_cores,
    read_gpus,
    read_membership,
    read_memory,
    read_packages,
    read_segments,
)
from megarl.doctor.packages import (
    EXTRA,
    LORA,
    Packages,
    Ranges,
    check_megarl,
    check_python,
    check_requirements,
    check_vllm,
    ranges_of,
)
from megarl.doctor.toolchain import toolchain
from megarl.doctor.variables import check_cluster, check_platform, check_variables
from megarl.parallel.environment import PlatformName
from megarl.rollout.shared_memory import FOLDER as SHARED_MEMORY


def examine(environ: Mapping[str, str] = os.environ) -> list[Finding]:
    """Return all findings on this machine, as seen from the current folder with the given variables."""
    finding, platform = check_platform(environ)
    packages = read_packages()
    ranges = ranges_of(packages["megarl"].requires if "megarl" in packages else (), EXTRA[platform], LORA)
    listing, refusal = read_gpus()
    gpus = parse_gpus(listing)
    return [
        finding,
        *_software(packages, ranges, platform),
        *_accelerator(packages, ranges, platform, gpus),
        check_gpus(gpus, refusal, read_build("torch"), platform, environ),
        *_to_compile(packages, platform, environ),
        *_machine(platform),
        *_storage(environ),
        *check_variables(environ, platform, len(gpus), read_cores(read_membership())[0]),
        *check_cluster(environ),
    ]


def _software(packages: Packages, ranges: Ranges, platform: PlatformName) -> list[Finding]:
    setup = Path(megarl.__file__).resolve().parents[1] / "setup.py"
    source = setup.read_text(encoding="utf-8") if setup.is_file() else None
    requires_python = packages["megarl"].requires_python if "megarl" in packages else ""
    return [
        check_python(host.python_version(), requires_python),
        check_megarl(packages, megarl.__version__, source),
        *check_requirements(packages, ranges),
        check_vllm(packages, ranges, platform),
    ]


def _to_compile(packages: Packages, platform: PlatformName, environ: Mapping[str, str]) -> list[Finding]:
    """Return what Transformer Engine's compiling would lack, where it is wanted and not there."""
    if platform == "cpu" or "transformer-engine-torch" in packages:
        return []
    found = [finding for finding in toolchain(environ) if finding.name != "driver"]
    return [replace(finding, level="warn") if finding.level == "FAIL" else finding for finding in found]


def _accelerator(packages: Packages, ranges: Ranges, platform: PlatformName, gpus: tuple[Gpu, ...]) -> list[Finding]:
    torch = read_build("torch")
    companions = {name: build for name in COMPANIONS if (build := read_build(name))}
    apex = folder_of("apex")
    version = packages["apex"].version if "apex" in packages else str(apex)
    te = check_transformer_engine(packages, ranges, platform)
    return [
        check_torch(packages, torch, ranges, platform),
        check_nccl(packages, platform),
        *check_companions(packages, companions, torch),
        te,
        check_flash_attention(packages, gpus, platform),
        check_apex(
            version if apex else None,
            has_optimizers=apex is not None and (apex / "optimizers").is_dir(),
            has_kernels=is_importable("amp_C"),
            platform=platform,
            has_te=te.name in packages and te.level != "FAIL",
        ),
    ]


def _machine(platform: PlatformName) -> list[Finding]:
    membership = read_membership()
    findings = [check_memory(read_memory(membership)), check_cores(*read_cores(membership))]
    if SHARED_MEMORY.is_dir():
        usage = shutil.disk_usage(SHARED_MEMORY)
        findings.append(check_shared_memory(usage.total, usage.free, platform))
        segments = read_segments(SHARED_MEMORY)
        findings.append(check_segments(segments, *(mapped_names(SHARED_MEMORY) if segments else (set(), 0))))
    pids = group_limit("pids", "pids.max", "pids.max", membership)
    return [
        *findings,
        check_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE)),
        check_processes(resource.getrlimit(resource.RLIMIT_NPROC)[0], int(pids) if pids else None),
        check_ports(busy_ports(PORTS)),
    ]


def _storage(environ: Mapping[str, str]) -> list[Finding]:
    places = (("outputs", Path.cwd() / "outputs", True), ("hf cache", hub_cache(environ, Path.home()), False))
    findings = []
    for name, folder, needed in places:
        there = nearest_existing(folder.absolute())
        free_bytes = shutil.disk_usage(there).free
        findings.append(check_disk(name, folder, free_bytes, os.access(there, os.W_OK), needed))
    return findings
