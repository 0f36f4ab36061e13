"""Which platform a process is on, what its processes need, and how the platform refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megarl.errors import ConfigError
from megarl.parallel.environment import passed_environment, platform_environment, platform_name
from megarl.parallel.platform import Platform
from tests.tiny_task import write_tiny_task


def _python(program: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a fresh interpreter, where nothing is imported yet."""
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=os.environ | environ, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_the_user_decides_on_the_platform(name: str) -> None:
    assert platform_name({"MEGARL_PLATFORM": name}) == name


def test_an_unknown_platform_is_an_error_that_says_which_there_are() -> None:
    with pytest.raises(ConfigError, match=r"MEGARL_PLATFORM = 'tpu': must be cpu or cuda"):
        platform_name({"MEGARL_PLATFORM": "tpu"})


@pytest.mark.skipif(Path("/proc/driver/nvidia").exists(), reason="a machine with a driver")
def test_cuda_on_a_machine_without_a_driver_is_one_error_before_anything_starts(tmp_path: Path) -> None:
    write_tiny_task(tmp_path)
    for program in ("main_ppo", "main_sft"):
        config = "rl" if program == "main_ppo" else "sft"
        command = [sys.executable, "-m", f"megarl.{program}", "--config-dir=.", f"--config-name={config}"]
        environ = os.environ | {"MEGARL_PLATFORM": "cuda"}
        done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("ResourceError: MEGARL_PLATFORM=cuda, but no NVIDIA driver shows a GPU")
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_a_process_from_which_all_gpus_are_hidden_is_on_cpu(hidden: str) -> None:
    assert platform_name({"CUDA_VISIBLE_DEVICES": hidden}) == "cpu"


def test_ranks_on_cpu_keep_to_one_thread_and_do_not_compile() -> None:
    environment = platform_environment({"MEGARL_PLATFORM": "cpu"})
    assert (environment["OMP_NUM_THREADS"], environment["TORCHDYNAMO_DISABLE"]) == ("1", "1")


def test_ranks_on_cuda_use_their_threads_and_compile() -> None:
    environment = platform_environment({"MEGARL_PLATFORM": "cuda"})
    assert not {"OMP_NUM_THREADS", "TORCHDYNAMO_DISABLE"} & set(environment)
    assert environment["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert environment["NVIDIA_TF32_OVERRIDE"] == "0", "float32 would be TF32 with Transformer Engine"


def test_the_environment_leaves_what_the_user_set() -> None:
    environment = platform_environment({"MEGARL_PLATFORM": "cpu", "OMP_NUM_THREADS": "7"})
    assert environment["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_ranks_on_other_hosts_are_of_the_same_platform(platform: str) -> None:
    assert platform_environment({"MEGARL_PLATFORM": platform})["MEGARL_PLATFORM"] == platform


def test_the_platform_does_not_decide_on_the_network() -> None:
    assert "HF_HUB_OFFLINE" not in platform_environment({"MEGARL_PLATFORM": "cpu"})


def test_the_environment_is_applied_before_torch_is_imported() -> None:
    program = (
        "import os, sys; from megarl.parallel.environment import apply_environment; apply_environment()\n"
        "print(os.environ['VLLM_CPU_OMP_THREADS_BIND'], 'torch' in sys.modules)"
    )
    assert _python(program, MEGARL_PLATFORM="cpu").stdout == "nobind False\n"


def test_each_platform_has_its_backend_and_devices() -> None:
    cpu, cuda = Platform("cpu"), Platform("cuda")
    assert (cpu.backend, cpu.device(3)) == ("gloo", torch.device("cpu"))
    assert (cuda.backend, cuda.device(3)) == ("nccl", torch.device("cuda", 3))


def test_cuda_without_a_usable_gpu_is_an_error_with_the_way_out() -> None:
    program = "from megarl.parallel.platform import install_platform; install_platform()"
    run = _python(program, MEGARL_PLATFORM="cuda", CUDA_VISIBLE_DEVICES="")
    assert "ResourceError: the platform is cuda, but torch" in run.stderr
    assert "MEGARL_PLATFORM=cpu" in run.stderr


def test_the_platform_has_to_come_before_megatron() -> None:
    program = (
        "import sys, types; sys.modules['megatron.core'] = types.ModuleType('megatron.core')\n"
        "from megarl.parallel.platform import install_platform; install_platform()"
    )
    run = _python(program, MEGARL_PLATFORM="cpu")
    assert "install_platform() must run before the first import of megatron.core" in run.stderr


def test_ranks_elsewhere_get_what_the_network_and_the_hub_need_and_what_is_named() -> None:
    environ = {
        "NCCL_DEBUG": "INFO",
        "GLOO_SOCKET_IFNAME": "ib0",
        "UCX_TLS": "rc",
        "HF_HOME": "cache",
        "https_proxy": "proxy",
        "NO_PROXY": "localhost",
        "VLLM_CACHE_ROOT": "cache",
        "NVTE_DEBUG": "1",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "MY_REWARD_URL": "url",
        "PATH": "bin",
        "HOME": "home",
        "VLLM_HOST_IP": "10.0.0.1",  # of this node
    }
    passed = passed_environment(("MY_REWARD_URL", "NOT_SET"), environ)
    assert passed == {name: environ[name] for name in environ if name not in ("PATH", "HOME", "VLLM_HOST_IP")}
