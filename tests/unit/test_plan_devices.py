from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megarl.errors import ConfigError
from megarl.plan.devices import (
    DEVICES,
    Device,
    bytes_for_ranks,
    cpu_device,
    device,
    held_in_group,
    held_memory_bytes,
    machine_memory_bytes,
)
from megarl.weights.model_facts.shipped import nearest_shipped, shipped_config, shipped_names
from megarl.weights.model_shape import parse_model_shape

GIB = 2**30

# Parameters of each model's published weights, tied embeddings counted once: on Hugging Face, metadata.total_size of
# model.safetensors.index.json over 2 bytes, or the model page's safetensors total where the weights are one file.
PUBLISHED_PARAMETERS = {
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-14B-Instruct": 14_770_033_664,
    "Qwen/Qwen2.5-32B-Instruct": 32_763_876_352,
    "Qwen/Qwen2.5-72B-Instruct": 72_706_203_648,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "Qwen/Qwen3-235B-A22B": 235_093_634_560,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.1-70B-Instruct": 70_553_706_496,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "mistralai/Mixtral-8x7B-Instruct-v0.1": 46_702_792_704,
    "mistralai/Mixtral-8x22B-Instruct-v0.1": 140_630_071_296,
}

# Billions of parameters that one token passes through, by the model cards and the Mixtral papers.
PUBLISHED_ACTIVE_BILLIONS = {
    "Qwen/Qwen3-30B-A3B": 3.3,
    "Qwen/Qwen3-235B-A22B": 22.0,
    "mistralai/Mixtral-8x7B-Instruct-v0.1": 12.9,
    "mistralai/Mixtral-8x22B-Instruct-v0.1": 39.0,
}


def _facts(name: str) -> dict[str, Any]:
    config = shipped_config(name)
    assert config is not None, name
    return config


def _parameters(config: dict[str, Any], *, active: bool = False) -> int:
    """Return the parameters of a model, or those that one token passes through."""
    (family,) = config["architectures"]
    hidden, heads, kv_heads = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim", hidden // heads)
    q, kv = heads * head_dim, kv_heads * head_dim
    biases = q + 2 * kv if family.startswith("Qwen2") else 0
    qk_norms = 2 * head_dim if family.startswith("Qwen3") else 0
    attention = 2 * hidden * q + 2 * hidden * kv + biases + qk_norms
    experts = config.get("num_experts") or config.get("num_local_experts") or 0
    router = hidden * experts
    used = config["num_experts_per_tok"] if experts and active else experts or 1
    mlp = 3 * hidden * config.get("moe_intermediate_size", config["intermediate_size"]) * used
    embeddings = config["vocab_size"] * hidden * (1 if config["tie_word_embeddings"] else 2)
    return int(embeddings + hidden + config["num_hidden_layers"] * (attention + router + mlp + 2 * hidden))


def test_every_shipped_model_has_a_published_parameter_count() -> None:
    assert set(shipped_names()) == set(PUBLISHED_PARAMETERS)


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_the_facts_of_a_model_give_the_published_number_of_parameters(name: str) -> None:
    assert _parameters(_facts(name)) == PUBLISHED_PARAMETERS[name]


@pytest.mark.parametrize("name", PUBLISHED_ACTIVE_BILLIONS)
def test_the_facts_of_an_expert_model_give_the_published_number_of_active_parameters(name: str) -> None:
    active = _parameters(_facts(name), active=True) / 1e9
    assert active == pytest.approx(PUBLISHED_ACTIVE_BILLIONS[name], rel=0.02)


@pytest.mark.parametrize("name", sorted(set(PUBLISHED_PARAMETERS) - set(PUBLISHED_ACTIVE_BILLIONS)))
def test_the_facts_of_a_dense_model_are_all_that_its_shape_is_read_from(name: str) -> None:
    config = _facts(name)
    shape = parse_model_shape(config, name)
    assert (shape.num_layers, shape.hidden_size) == (config["num_hidden_layers"], config["hidden_size"])
    assert shape.rope.theta == config["rope_theta"] > 10000.0
    assert shape.head_dim == (64 if name.endswith(("2.5-0.5B-Instruct", "3.2-1B-Instruct")) else 128)


def test_a_model_is_found_in_any_case_and_without_its_owner() -> None:
    whole = _facts("Qwen/Qwen3-235B-A22B")
    assert whole["num_experts"] == 128
    assert _facts("qwen/qwen3-235b-a22b") == _facts("Qwen3-235B-A22B") == whole


@pytest.mark.parametrize("name", ["Qwen/Qwen4-1T", "meta-llama/Qwen3-8B", "Qwen3", "", "../shipped"])
def test_a_model_without_facts_is_none(name: str) -> None:
    assert shipped_config(name) is None


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("Qwen/Qwen3-235B", "Qwen/Qwen3-235B-A22B"),
        ("qwen3-235b", "Qwen/Qwen3-235B-A22B"),
        ("Qwen/Qwen3-8b-", "Qwen/Qwen3-8B"),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct"),
    ],
)
def test_a_name_that_is_nearly_right_has_a_nearest_one(name: str, near: str) -> None:
    assert nearest_shipped(name) == f"did you mean {near!r}?"


@pytest.mark.parametrize("name", ["/data/Qwen3-8B", "./Qwen3-8B", "~/Qwen3-8B", "a/b/Qwen3-8B", "zzz"])
def test_a_folder_is_near_to_no_name(name: str) -> None:
    assert nearest_shipped(name) == ""


def test_a_caller_that_changes_the_facts_does_not_change_them_for_the_next() -> None:
    _facts("Qwen3-8B")["num_hidden_layers"] = 1
    assert _facts("Qwen3-8B")["num_hidden_layers"] == 36


def test_devices_are_found_in_any_case() -> None:
    assert device("h100") is device("H100") is DEVICES["H100"]
    assert set(DEVICES) >= {"A100-40", "A100-80", "H100", "H200", "H20", "H20-141", "B200", "L40S"}


@pytest.mark.parametrize("gpu", DEVICES.values(), ids=list(DEVICES))
def test_a_process_finds_less_memory_on_a_gpu_than_is_marketed_but_nearly_all(gpu: Device) -> None:
    # Marketed gigabytes of HBM count 2**30 bytes on some GPUs and 1e9 on others, so the larger is the bound.
    marketed_gb = int(gpu.marketed.removesuffix(" GB"))
    assert 0.92 * marketed_gb < gpu.memory_bytes / GIB < marketed_gb
    assert gpu.memory_bytes > 0.98 * marketed_gb * 1e9


@pytest.mark.parametrize("gpu", DEVICES.values(), ids=list(DEVICES))
def test_each_figure_of_a_gpu_names_its_source_and_is_in_plain_units(gpu: Device) -> None:
    assert gpu.source and gpu.memory_source and gpu.inter_node_source.startswith("assumed")
    assert 1e14 < gpu.bf16_flops_per_s < 1e16
    assert gpu.inter_node_bytes_per_s <= gpu.link_bytes_per_s < gpu.memory_bytes_per_s < 1e13
    assert gpu.host_link_bytes_per_s <= gpu.link_bytes_per_s


def test_an_unknown_device_is_an_error_that_names_the_key_the_known_and_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        device("H10O", key="trainer.device")
    (problem,) = caught.value.problems
    assert (problem.key, problem.value) == ("trainer.device", "H10O")
    assert "H100, " in problem.allowed and problem.allowed.endswith("cpu")
    assert problem.fix == "did you mean 'h100'?"
    assert device("h100").name == "H100"


def test_ranks_share_the_memory_of_the_machine_they_stand_on() -> None:
    whole, shared = device("cpu"), cpu_device(ranks_per_node=4)
    assert 0 < whole.memory_bytes < machine_memory_bytes()
    assert shared.memory_bytes == pytest.approx(whole.memory_bytes / 4, rel=0.1)  # others come and go meanwhile
    assert shared.bf16_flops_per_s == whole.bf16_flops_per_s / 4
    assert whole.source.startswith("assumed") and "container" in whole.memory_source


def test_ranks_may_hold_what_rays_threshold_and_the_rest_of_the_machine_leave() -> None:
    total, held = 23 * GIB + GIB // 2, GIB
    assert bytes_for_ranks(total, held) == pytest.approx((0.95 * 23.5 - 1 - 1) * GIB, abs=1)
    assert bytes_for_ranks(total, total) == 0


def test_memory_is_held_where_the_kernel_would_not_give_it_away(tmp_path: Path) -> None:
    info = tmp_path / "meminfo"
    info.write_text(
        "MemTotal:       1000 kB\nMemFree:         100 kB\nMemAvailable:    700 kB\nHugePages_Total:    0\n"
    )
    if machine_memory_bytes() == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):  # in no container
        assert held_memory_bytes(info) == 300 * 1024
    assert 0 < held_memory_bytes() < machine_memory_bytes()


def test_a_container_holds_what_it_uses_but_for_files_it_could_read_again(tmp_path: Path) -> None:
    assert held_in_group(tmp_path) is None
    (tmp_path / "memory.current").write_text("5000\n")
    (tmp_path / "memory.stat").write_text("anon 3000\ninactive_file 1500\n")
    assert held_in_group(tmp_path) == 3500


def test_the_memory_of_the_machine_is_what_its_kernel_counts_or_less() -> None:
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        pytest.skip("only Linux lists its memory there")
    (total_kib,) = [line.split()[1] for line in meminfo.read_text().splitlines() if line.startswith("MemTotal")]
    assert 0 < machine_memory_bytes() <= int(total_kib) * 1024 + os.sysconf("SC_PAGE_SIZE")


def test_devices_and_facts_load_without_torch() -> None:
    script = "import sys, megarl.plan.devices, megarl.weights.model_facts.shipped; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == "False"
