"""What the processes of an engine are started with, and where that is refused."""

from __future__ import annotations

import re
import socket

import pytest

from megarl.checks.rules import an_engine_replica_divides_the_ranks
from megarl.errors import ConfigError, ResourceError
from megarl.launchers.engine_processes import engine_environment
from megarl.launchers.start import check_launch, engine_devices
from megarl.roles import num_engines
from tests.unit.composed_configs import ppo_config

SERVED: dict[str, object] = {"actor_rollout_ref.rollout.placement": "server"}


def test_a_rank_of_an_engine_is_one_of_its_engine_alone() -> None:
    trainers = {
        "RANK": "3",
        "WORLD_SIZE": "8",
        "MASTER_PORT": "1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "HOME": "/h",
    }
    found = engine_environment(1, 2, 29500, None, trainers)
    assert found == {
        "HOME": "/h",
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }


def test_a_rank_of_an_engine_on_a_gpu_sees_that_alone_and_none_of_rays_secrets() -> None:
    found = engine_environment(1, 2, 29500, "6", {"CUDA_VISIBLE_DEVICES": "0,6", "RAY_AUTH_TOKEN": "secret"})
    assert (found["CUDA_VISIBLE_DEVICES"], found["LOCAL_RANK"]) == ("6", "0")
    assert "secret" not in found.values()


@pytest.mark.parametrize(("num_devices", "named"), [(1, ("9",)), (3, ("9", "10", "11"))])
def test_engines_get_the_devices_after_the_trainers(
    monkeypatch: pytest.MonkeyPatch, num_devices: int, named: tuple[str, ...]
) -> None:
    monkeypatch.setenv("MEGARL_PLATFORM", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,2,3,4,5,6,7,8,9,10,11")
    config = ppo_config(**(SERVED | {"actor_rollout_ref.rollout.n_gpus_per_node": num_devices}))
    assert engine_devices(config) == named


def test_engines_without_devices_of_their_own_get_the_trainers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGARL_PLATFORM", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,2,3,4,5,6,7,8")
    config = ppo_config(**(SERVED | {"actor_rollout_ref.rollout.n_gpus_per_node": 0}))
    assert engine_devices(config) == tuple("12345678") and num_engines(config) == 8
    monkeypatch.setenv("MEGARL_PLATFORM", "cpu")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(ConfigError, match="must be at least 1 with RAY_ADDRESS"):
        check_launch(config)


def test_devices_that_the_node_has_not_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGARL_PLATFORM", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    with pytest.raises(ResourceError, match=r"need 9 devices of this node .*, which shows 8\. fix: "):
        engine_devices(ppo_config(**SERVED))


@pytest.mark.parametrize("key", ["trainer.nnodes", "actor_rollout_ref.rollout.nnodes"])
def test_engines_and_ranks_of_several_nodes_are_for_a_cluster_or_hosts_of_engines(
    monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("MEGARL_PLATFORM", "cpu")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = ppo_config(**(SERVED | {key: 2}))
    without = "must be 1 without RAY_ADDRESS and MEGARL_ENGINE_HOSTS: engines .* start on this node"
    with pytest.raises(ConfigError, match=rf"{key} = 2: {without}"):
        check_launch(config)
    with monkeypatch.context() as named, socket.create_server(("127.0.0.1", 0)) as head:
        named.setenv("RAY_ADDRESS", f"127.0.0.1:{head.getsockname()[1]}")
        check_launch(config)
    name_hosts(monkeypatch)
    check_launch(config)


def name_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGARL_ENGINE_HOSTS", "10.0.0.1:29510")
    monkeypatch.setenv("MEGARL_JOB_TOKEN", "the token of this job")


@pytest.mark.parametrize(
    ("overrides", "ray_address", "said"),
    [
        (
            {},
            "",
            "MEGARL_ENGINE_HOSTS = '10.0.0.1:29510': is for engines in processes of their own, and those of this run "
            "are in the trainer's ranks",
        ),
        (SERVED, "10.0.0.1:6379", "MEGARL_ENGINE_HOSTS = '10.0.0.1:29510': is for engines that nobody else places"),
        (
            SERVED | {"actor_rollout_ref.rollout.n_gpus_per_node": 0},
            "",
            "actor_rollout_ref.rollout.n_gpus_per_node = 0: must be at least 1 with MEGARL_ENGINE_HOSTS",
        ),
    ],
)
def test_hosts_that_no_engine_of_the_run_is_for_are_refused(
    monkeypatch: pytest.MonkeyPatch, overrides: dict[str, object], ray_address: str, said: str
) -> None:
    monkeypatch.setenv("MEGARL_PLATFORM", "cpu")
    monkeypatch.setenv("RAY_ADDRESS", ray_address)
    name_hosts(monkeypatch)
    with pytest.raises(ConfigError, match=re.escape(said)):
        check_launch(ppo_config(**overrides))


def test_engines_on_hosts_need_no_devices_beside_the_trainers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGARL_PLATFORM", "cuda")
    monkeypatch.setenv("MEGARL_GPU", "H100")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    name_hosts(monkeypatch)
    check_launch(ppo_config(**SERVED))


@pytest.mark.parametrize(
    ("name", "placement", "expected"),
    [
        ("vllm", "server", "actor_rollout_ref.rollout.placement=colocated"),
        ("sglang", "colocated", "actor_rollout_ref.rollout.name=vllm"),
        ("sglang", "server", "actor_rollout_ref.rollout.name=vllm and actor_rollout_ref.rollout.placement=colocated"),
    ],
)
def test_engines_without_a_cluster_can_be_put_into_the_trainers_ranks_sglang_by_another_engine(
    monkeypatch: pytest.MonkeyPatch, name: str, placement: str, expected: str
) -> None:
    monkeypatch.setenv("MEGARL_PLATFORM", "cpu")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    engine = {"actor_rollout_ref.rollout.name": name, "actor_rollout_ref.rollout.placement": placement}
    with pytest.raises(ConfigError) as refused:
        check_launch(ppo_config(**(engine | {"trainer.nnodes": 2})))
    [problem] = refused.value.problems
    assert problem.fix.endswith(f", or {expected}, or trainer.nnodes=1")


def test_no_engine_is_on_two_nodes() -> None:
    rollout = "actor_rollout_ref.rollout"
    sizes = {f"{rollout}.nnodes": 2, f"{rollout}.n_gpus_per_node": 3, f"{rollout}.tensor_model_parallel_size": 2}
    config = ppo_config(**(SERVED | sizes))
    [problem] = an_engine_replica_divides_the_ranks(config)
    assert str(problem.allowed).startswith("must divide the 3 devices of the engines")
