"""How long a run has to save once the machine is wanted back."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from megarl.errors import ConfigError
from megarl.launchers.start import check_launch, preemption_of
from megarl.monitor.preemption import Limit
from tests.launch import python, run
from tests.unit.composed_configs import sft_config


def test_a_run_has_the_time_that_its_config_says() -> None:
    assert preemption_of(sft_config().trainer, print).limit == Limit(120.0, "trainer.preempt_save_s")


@pytest.mark.parametrize(
    ("grace", "limit"),
    [
        ("125", Limit(120.0, "trainer.preempt_save_s")),
        ("30", Limit(25.0, "torchrun kills ranks after 30 s; its --shutdown-timeout=125 lets them be")),
        ("3", Limit(0.0, "torchrun kills ranks after 3 s; its --shutdown-timeout=125 lets them be")),
    ],
)
def test_under_torchrun_a_run_is_to_be_done_before_torchrun_kills_it(
    monkeypatch: pytest.MonkeyPatch, grace: str, limit: Limit
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("PET_SHUTDOWN_TIMEOUT", grace)
    assert preemption_of(sft_config().trainer, print).limit == limit


@pytest.mark.skipif(find_spec("aiohttp_cors") is not None, reason="the dashboard's packages are installed")
def test_a_dashboard_whose_packages_are_not_installed_is_refused_with_the_file_that_names_them() -> None:
    config = sft_config()
    config = replace(config, trainer=replace(config.trainer, ray_dashboard=True))
    with pytest.raises(
        ConfigError, match=r"trainer\.ray_dashboard = True.*aiohttp_cors(.|\n)*requirements/ray_jobs\.txt"
    ):
        check_launch(config)


@pytest.mark.parametrize("program", ["main_ppo", "main_sft", "verify"])
def test_what_only_prints_is_printed_by_one_of_the_ranks_and_none_waits_for_a_run(tmp_path: Path, program: str) -> None:
    printed = []
    for rank in ("0", "1"):
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        place = {"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
        done = run(python("-m", f"megarl.{program}", "--help"), tmp_path, environ=world | place, timeout_s=60)
        assert done.code == 0, done.output
        printed.append(done.stdout)
    assert f"python -m megarl.{program}" in printed[0] and printed[1] == ""
