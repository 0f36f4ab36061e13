"""What the processes of an engine are started with, and where that is refused."""

from __future__ import annotations

import pytest

from megarl.errors import ConfigError, ResourceError
from megarl.launchers.engine_processes import engine_environment
from megarl.launchers.start import check_launch, engine_devices
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


def test_devices_that_the_node_has_not_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGARL_PLATFORM", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    with pytest.raises(ResourceError, match=r"need 9 devices of this node .*, which shows 8\. fix: "):
        engine_devices(ppo_config(**SERVED))


def test_engines_are_not_started_beside_a_command_that_joins_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGARL_PLATFORM", "cpu")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(ConfigError, match="engines in processes of their own start beside the command"):
        check_launch(ppo_config(**SERVED))
