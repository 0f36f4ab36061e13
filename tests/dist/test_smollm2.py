"""A real pretrained model, SmolLM2-135M-Instruct: its log-probs are transformers' on any split, and the engine's.

The packages that hold it are in requirements/smollm2.txt.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from megarl.data.smollm2 import prepare_smollm2, require_packages
from megarl.errors import DataError
from megarl.parallel.layout import Layout
from megarl.roles import Role
from megarl.train.actor import Actor
from megarl.types import Sequences
from megarl.verify.figures import Tolerances
from megarl.verify.pool import RankPool
from megarl.verify.reference import TEMPERATURE, Reference, make_reference
from megarl.verify.roles import role_on
from megarl.verify.work import backend_on_rank, score
from tests.launch import python, run

try:
    require_packages()
    WHY_MISSING = ""
except DataError as error:
    WHY_MISSING = str(error)

pytestmark = [pytest.mark.long, pytest.mark.skipif(bool(WHY_MISSING), reason=WHY_MISSING)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with smollm2_data/, as the recipe expects it."""
    out = tmp_path_factory.mktemp("smollm2")
    prepare_smollm2(out / "smollm2_data")
    return out


@pytest.fixture(scope="module")
def found(folder: Path) -> Reference:
    """Return what transformers says of the model."""
    return make_reference(folder / "smollm2_data" / "model", 49_152)


def logprobs_of(role: Role, everything: Sequences) -> torch.Tensor | None:
    """Score on a rank; None where it doesn't report."""
    return score(Actor(backend_on_rank(role)), everything, TEMPERATURE)


@pytest.mark.parametrize("layout", [Layout(1), Layout(3, tp=3), Layout(2, pp=2)], ids=["tp1", "tp3", "pp2"])
def test_logprobs_are_those_of_transformers(ranks: RankPool, found: Reference, layout: Layout) -> None:
    role = role_on(layout, found.folder)
    answers = ranks.run(logprobs_of, role, found.everything, world_size=layout.world_size, timeout_s=900.0)
    logprobs_BS = torch.cat([answer for answer in answers if answer is not None])
    allowed = Tolerances.logprobs * found.noise.logprobs
    assert 0 < allowed < 1e-3
    torch.testing.assert_close(logprobs_BS.double(), found.exact_logprobs_BS, rtol=0, atol=allowed)


def test_the_engine_gives_the_trainers_logprobs_after_each_publish(folder: Path) -> None:
    command = python(
        *("-m", "megarl.main_ppo", "--config-name=ppo_megatron_trainer", "experiment=smollm2_count"),
        *("trainer.run_dir=run", "trainer.logger=[jsonl]", "trainer.n_gpus_per_node=3"),
        *("trainer.total_training_steps=2", "trainer.val_before_train=false", "trainer.test_freq=null"),
        *("data.train_batch_size=4", "actor_rollout_ref.rollout.n=2", "actor_rollout_ref.actor.ppo_mini_batch_size=8"),
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8",
        "actor_rollout_ref.actor.megatron.tensor_model_parallel_size=3",
        "actor_rollout_ref.rollout.tensor_model_parallel_size=3",
    )
    finished = run(command, folder, environ={"PATH": os.environ["PATH"]}, timeout_s=1800.0)
    assert finished.code == 0, finished.output
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    differences = [line["rollout_train/logprob_diff_max"] for line in lines if "rollout_train/logprob_diff_max" in line]
    assert len(differences) == 2
    assert 0 < max(differences) < 1e-3
