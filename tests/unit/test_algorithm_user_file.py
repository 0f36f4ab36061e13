"""Estimators and losses of the user's own: what a file registers is used, and what is wrong with it is named."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megarl.algorithm.advantage import AdvantageInputs, AdvantageSettings, estimate_advantages, estimators
from megarl.algorithm.policy_loss import PolicyLossInputs, PolicyLossSettings, policy_losses, token_loss
from megarl.algorithm.recipe import Recipe
from megarl.algorithm.registry import Registry
from megarl.algorithm.user_file import load_user_file
from megarl.checks.algorithm_file import load_algorithm_file
from megarl.config.schema import PPOConfig
from megarl.controller.sampler import RolloutSampler
from megarl.errors import AlgorithmError, ConfigError, Problem
from megarl.reward.registry import load_reward
from tests.unit.composed_configs import ppo_config, problems_without_files
from tests.unit.stand_ins import PlainRanks, run_on

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extending.md"
LOSS = "actor_rollout_ref.actor.policy_loss"
N = "actor_rollout_ref.rollout.n"
HEADER = """\
import torch
from megarl.algorithm.advantage import Advantages, Needs, estimators
from megarl.algorithm.policy_loss import TokenLoss, policy_losses
"""

INPUTS = AdvantageInputs(
    rewards_B=torch.tensor([1.0, 0.0, 0.5, 0.5]),
    group_B=torch.tensor([0, 0, 1, 1]),
    mask_BS=torch.tensor([[True, True], [True, False], [True, True], [True, True]]),
)


@pytest.fixture(autouse=True)
def registries_as_before() -> Iterator[None]:
    """Take out of the registries what a test loads."""
    registries: tuple[Registry[Any], ...] = (estimators, policy_losses)
    before = [registry.names() for registry in registries]
    yield
    for registry, names in zip(registries, before, strict=True):
        registry.forget(set(registry.names()) - set(names))


def write(folder: Path, source: str, name: str = "mine.py") -> str:
    path = folder / name
    path.write_text(HEADER + source)
    return str(path)


def an_estimator(result: str, needs: str = "Needs()", name: str = "mine") -> str:
    return f"@estimators.register({name!r}, {needs})\ndef mine(inputs, settings):\n    return {result}\n"


def a_loss(result: str) -> str:
    return f"@policy_losses.register('mine')\ndef mine_loss(inputs, settings):\n    return {result}\n"


MASK = "Advantages(inputs.mask_BS.float())"


def own(path: str, **changes: object) -> PPOConfig:
    return ppo_config(**{"algorithm.path": path, "algorithm.adv_estimator": "mine", **changes})


def problems_of(config: PPOConfig) -> tuple[Problem, ...]:
    with pytest.raises(ConfigError) as caught:
        load_algorithm_file(config)
    return caught.value.problems


def loss_inputs(advantages: list[float]) -> PolicyLossInputs:
    size = len(advantages)
    logprobs_N = torch.linspace(-1.0, 1.0, size).requires_grad_()
    return PolicyLossInputs(
        logprobs_N, torch.zeros(size), torch.tensor(advantages), torch.zeros(size, dtype=torch.int64), 1
    )


def example(name: str) -> str:
    """Return the code of the documentation whose first line is ``# name``."""
    [code] = re.findall(rf"```python\n(# {re.escape(name)}\n.*?)```", PAGE.read_text(), flags=re.DOTALL)
    return str(code)


def test_the_documented_estimator_and_loss_run_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "my_algorithm.py"
    path.write_text(example("my_algorithm.py"))
    config = ppo_config(**{"algorithm.path": str(path), "algorithm.adv_estimator": "sign", LOSS: "clip_above", N: 2})
    assert problems_without_files(config) == []
    assert load_algorithm_file(config) == str(path)

    advantages = Recipe(config).estimate(INPUTS)
    assert advantages.advantages_BS.tolist() == [[1.0, 1.0], [-1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    assert advantages.advantages_BS.dtype == torch.float32

    inputs = loss_inputs([1.0, -1.0, 1.0])
    loss = token_loss("clip_above", inputs, PolicyLossSettings(clip_high=0.2))
    torch.testing.assert_close(loss.loss_N, torch.tensor([-(torch.e**-1), 1.0, -1.2]))
    assert loss.clipped_N.tolist() == [0.0, 0.0, 1.0]
    loss.loss_N.sum().backward()
    assert inputs.logprobs_N.grad is not None
    torch.testing.assert_close(inputs.logprobs_N.grad, torch.tensor([-(torch.e**-1), 1.0, 0.0]))


def test_the_documented_reward_runs_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "my_reward.py"
    path.write_text(example("my_reward.py"))
    reward = load_reward(path=str(path))
    scores = [
        reward(data_source="", solution_str=text, ground_truth="5", extra_info={"finish_reason": reason})
        for text, reason in (("so 5", "stop"), ("so 5", "length"), ("5 not", "stop"), ("", "stop"))
    ]
    assert scores == [1.0, 0.9, 0.0, 0.0]


def test_the_documented_command_names_what_the_documented_files_register() -> None:
    [command] = re.findall(r"```bash\n([^`]*algorithm\.path[^`]*)```", PAGE.read_text())
    words = dict(word.split("=", 1) for word in command.replace("\\\n", " ").split() if "=" in word)
    assert f'estimators.register("{words["algorithm.adv_estimator"]}"' in example(words["algorithm.path"])
    assert f'policy_losses.register("{words[LOSS]}"' in example(words["algorithm.path"])
    assert "def compute_score" in example(words["reward.path"])


def test_without_a_file_nothing_is_loaded() -> None:
    before = estimators.names()
    assert load_algorithm_file(ppo_config()) is None
    assert estimators.names() == before


def test_a_file_is_run_once_in_a_process_though_controller_and_rank_ask_for_it(tmp_path: Path) -> None:
    path = write(tmp_path, an_estimator(MASK) + f"open({str(tmp_path / 'runs')!r}, 'a').write('x')\n")
    load_algorithm_file(own(path))
    load_user_file(path)
    load_user_file(str(tmp_path / "." / "mine.py"))
    assert (tmp_path / "runs").read_text() == "x"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def f(:\n    pass\n", "mine.py, line 4: SyntaxError: invalid syntax"),
        ("x = 1\nx = 1 / 0\n", "mine.py, line 5: ZeroDivisionError: division by zero"),
        ("import nothing_of_this_name\n", "mine.py, line 4: ModuleNotFoundError: No module named"),
        ("def f():\n    raise SystemExit(3)\nf()\n", "mine.py, line 5: SystemExit: 3"),
        ("import re\nre.compile('(')\n", "mine.py, line 5: "),  # raised in a library: the line that called it
    ],
)
def test_a_file_that_fails_is_an_error_with_its_line_and_leaves_nothing_registered(
    tmp_path: Path, source: str, said: str
) -> None:
    before = estimators.names()
    path = write(tmp_path, source)
    [problem] = problems_of(own(path))
    assert (problem.key, problem.value) == ("algorithm.path", path)
    assert problem.allowed.startswith(said)
    Path(path).write_text(HEADER + an_estimator(MASK) + source)
    problems_of(own(path))
    assert estimators.names() == before


def test_a_mended_file_loads_after_one_that_failed(tmp_path: Path) -> None:
    problems_of(own(write(tmp_path, an_estimator(MASK) + "1 / 0\n")))
    load_algorithm_file(own(write(tmp_path, an_estimator(MASK))))
    assert "mine" in estimators.names()


def test_a_file_that_is_gone_on_this_machine_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"algorithm\.path = .*none\.py': there is no such \.py file on this machine"):
        load_user_file(str(tmp_path / "none.py"))


def test_a_name_of_megarls_own_cannot_be_taken(tmp_path: Path) -> None:
    [problem] = problems_of(own(write(tmp_path, an_estimator(MASK, name="grpo"))))
    assert (problem.key, problem.value) == ("algorithm.adv_estimator", "grpo")
    assert problem.allowed.endswith("(mine.py, line 4)")


def test_names_that_the_file_does_not_register_are_one_error_with_those_that_are_and_the_nearest(
    tmp_path: Path,
) -> None:
    path = write(tmp_path, an_estimator(MASK) + a_loss("TokenLoss(inputs.logprobs_N, inputs.logprobs_N)"))
    problems = problems_of(own(path, **{"algorithm.adv_estimator": "mime", LOSS: "ppo_klip"}))
    assert [(p.key, p.value) for p in problems] == [("algorithm.adv_estimator", "mime"), (LOSS, "ppo_klip")]
    assert ", gae, gdpo, gpg, grpo, grpo_passk, mine, opo, " in f", {problems[0].allowed.split('registered are ')[1]}"
    assert [p.fix for p in problems] == ["did you mean 'mine'?", "did you mean 'ppo_clip'?"]


@pytest.mark.parametrize(
    ("needs", "changes", "key", "said"),
    [
        ("Needs(values=True)", {}, "critic.enable", "mine needs a critic's values"),
        ("Needs()", {"critic.enable": True}, "critic.enable", "without Needs(values=True)"),
        ("Needs(min_group_size=5)", {}, N, "mine needs at least 5 rollouts a prompt"),
    ],
)
def test_what_an_estimator_needs_is_checked_before_the_run(
    tmp_path: Path, needs: str, changes: dict[str, object], key: str, said: str
) -> None:
    config = own(write(tmp_path, an_estimator(MASK, needs)), **changes)
    assert problems_without_files(config) == []
    [problem] = problems_of(config)
    assert problem.key == key and said in problem.allowed


def test_an_estimator_gets_what_it_needs(tmp_path: Path) -> None:
    path = write(tmp_path, an_estimator(MASK, "Needs(values=True, greedy_baseline=True, min_group_size=4)"))
    config = own(path, **{"critic.enable": True})
    load_algorithm_file(config)
    with_it, without = (run_on(PlainRanks(8), c, tmp_path) for c in (config, ppo_config()))
    assert isinstance(with_it.sampler, RolloutSampler) and isinstance(without.sampler, RolloutSampler)
    assert with_it.sampler.sampling.with_greedy and not without.sampler.sampling.with_greedy
    assert with_it.critic is not None and without.critic is None


@pytest.mark.parametrize(
    ("result", "said"),
    [
        ("inputs.mask_BS.float()", "must return Advantages, not a Tensor"),
        ("Advantages(inputs.rewards_B)", r"advantages_BS of shape \(4,\), must be \(4, 2\): rollouts x sequence"),
        ("Advantages(inputs.mask_BS / 0.0)", "advantages_BS that are NaN or infinite on 7 tokens"),
        (f"{MASK}, 1", "must return Advantages, not a tuple"),
    ],
)
def test_an_estimator_that_returns_something_else_is_named(tmp_path: Path, result: str, said: str) -> None:
    config = own(write(tmp_path, an_estimator(result)))
    load_algorithm_file(config)
    with pytest.raises(AlgorithmError, match=f"estimator mine .*{said}"):
        Recipe(config).estimate(INPUTS)


def test_a_critic_needs_returns_to_learn_from(tmp_path: Path) -> None:
    load_user_file(write(tmp_path, an_estimator(MASK)))
    with_values = AdvantageInputs(INPUTS.rewards_B, INPUTS.group_B, INPUTS.mask_BS, values_BS=torch.zeros(4, 2))
    with pytest.raises(AlgorithmError, match="estimator mine gave no returns_BS, which the critic learns from"):
        estimate_advantages("mine", with_values, AdvantageSettings())


def test_an_estimator_that_raises_is_named_with_file_and_line(tmp_path: Path) -> None:
    source = "def check(n):\n    raise ValueError(f'wants groups of 3, not {n}')\n" + an_estimator("check(2)")
    path = write(tmp_path, source)
    config = own(path)
    load_algorithm_file(config)
    said = f"algorithm.adv_estimator = 'mine' failed at {path}, line 5: ValueError: wants groups of 3, not 2"
    with pytest.raises(AlgorithmError, match=re.escape(said)):
        Recipe(config).estimate(INPUTS)


def test_an_error_of_megarls_own_estimator_keeps_its_traceback() -> None:
    config = ppo_config(**{"algorithm.adv_estimator": "gae"})
    with pytest.raises(AssertionError, match="gae needs the critic's values"):
        Recipe(config).estimate(INPUTS)


@pytest.mark.parametrize(
    ("result", "said"),
    [
        ("-inputs.logprobs_N", "must return a TokenLoss, not a Tensor"),
        ("TokenLoss(-inputs.logprobs_N.mean(), inputs.advantages_N)", r"loss_N of shape \(\), must be \(3,\)"),
        ("TokenLoss(-inputs.logprobs_N, inputs.advantages_N[:1])", r"clipped_N of shape \(1,\), must be \(3,\)"),
        ("TokenLoss(inputs.advantages_N, inputs.advantages_N)", "has no gradient: its loss_N must follow from"),
    ],
)
def test_a_loss_that_is_not_one_value_a_token_with_a_gradient_is_named(tmp_path: Path, result: str, said: str) -> None:
    load_user_file(write(tmp_path, a_loss(result)))
    with pytest.raises(AlgorithmError, match=f"policy loss mine .*{said}"):
        token_loss("mine", loss_inputs([1.0, 2.0, 3.0]), PolicyLossSettings())
