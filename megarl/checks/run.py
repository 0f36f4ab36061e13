"""All that can be known of a run before it starts, checked together: keys, rules, batches, models, data files.

Loads neither torch nor ray, so that a mistake costs a second or two.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Generic, TypeVar

from megarl.batching.plan import BatchPlan
from megarl.checks.backends import every_role_has_one_backend, has_fsdp
from megarl.checks.config import built, drop_consequences
from megarl.checks.data_files import check_chat_files, check_prompt_files
from megarl.checks.findings import Findings
from megarl.checks.idle import idle_settings
from megarl.checks.overrides import fused_kernels_are_installed
from megarl.checks.rules import model_problems, run_problems, without_followers
from megarl.checks.tokenizer_file import differing_token, largest_token
from megarl.config.schema import PPOConfig, SFTConfig, TrainedMegatronConfig
from megarl.errors import ConfigError, ModelFolderError, Problem
from megarl.parallel.environment import PlatformName, platform_name
from megarl.reward.registry import load_reward
from megarl.reward.source import check_reward_file
from megarl.roles import ModelFacts, Role, batch_plan, role_named, roles_of, with_total_steps
from megarl.weights.any_model import read_shape
from megarl.weights.folder import resolve_model_folder
from megarl.weights.model_facts.shipped import nearest_shipped, shipped_config
from megarl.weights.model_shape import ModelShape, parse_model_shape, read_model_shape

C = TypeVar("C", PPOConfig, SFTConfig)

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class CheckedRun(Generic[C]):
    """A run without a known mistake.

    num_rows: rows of the training files, before too long ones are left out; None where they aren't here. notes: what
    couldn't be checked on this machine, each by its key. idle: settings that do nothing, see megarl.checks.idle.
    """

    config: C
    roles: tuple[Role, ...]
    num_rows: int | None = None
    notes: tuple[str, ...] = ()
    idle: tuple[Problem, ...] = ()

    @property
    def actor(self) -> Role:
        """The actor."""
        return self.roles[0]

    @property
    def batches(self) -> dict[str, BatchPlan]:
        """The batch arithmetic of every trained role, by its name."""
        return {role.name: batch_plan(self.config, role) for role in self.roles if role.is_trained}

    @property
    def num_steps(self) -> int | None:
        """Steps of the run, None where nothing here says so."""
        trainer = self.config.trainer
        if trainer.total_training_steps or self.num_rows is None:
            return trainer.total_training_steps
        return trainer.total_epochs * (self.num_rows // self.config.data.train_batch_size)


def check_ppo(
    values: Mapping[str, Any], *, files_may_be_missing: bool = False, platform: PlatformName | None = None
) -> CheckedRun[PPOConfig]:
    """Check an RL run. Raises the named error of all that is wrong.

    files_may_be_missing: for a plan made far from the cluster; weights and data files are then noted as unchecked, a
    model that isn't here is taken from the architectures that megarl ships, and rows of data files are read. platform:
    of the run; unless given this machine's, and cuda where files may be missing.
    """
    found = Findings([] if files_may_be_missing else None)
    config, misread = built(PPOConfig, values)
    if backends := list(every_role_has_one_backend(config)):
        raise ConfigError([*misread, *backends])  # no role can be said to have this or that size
    platform = platform or ("cuda" if files_may_be_missing else platform_name())
    roles = _checked_roles(config, found, platform)
    found.problems += _a_token_means_the_same(roles)
    num_rows = check_prompt_files(config, found)
    _check_reward(config, found)
    return _finished(config, roles, num_rows, found, misread)


def check_sft(
    values: Mapping[str, Any], *, files_may_be_missing: bool = False, platform: PlatformName | None = None
) -> CheckedRun[SFTConfig]:
    """Check an SFT run; the rest as check_ppo. Raises the named error of all that is wrong."""
    found = Findings([] if files_may_be_missing else None)
    config, misread = built(SFTConfig, values)
    roles = _checked_roles(config, found, platform or ("cuda" if files_may_be_missing else platform_name()))
    return _finished(config, roles, check_chat_files(config, found), found, misread)


def _finished(
    config: C, roles: tuple[Role, ...], num_rows: int | None, found: Findings, misread: Collection[Problem]
) -> CheckedRun[C]:
    """Return the checked run. Raises what was found. misread: the problems of values that defaults stand in for."""
    if found.notes is None:
        found.problems += _optimizers_are_installed(roles)
        found.problems += _adapters_are_installed(roles)
        found.problems += without_followers(fused_kernels_are_installed(roles), roles)
    idle = idle_settings(config, roles)
    found.problems += idle if config.trainer.strict else []
    drop_consequences(found, misread)
    found.problems = [*misread, *found.problems]
    found.finish()
    checked = CheckedRun(config, roles, num_rows, tuple(found.notes or ()), tuple(idle))
    found.problems += schedule_problems(checked, checked.num_steps)
    found.finish()
    return checked


def schedule_problems(checked: CheckedRun[C], num_steps: int | None) -> Iterator[Problem]:
    """Yield the problems of the schedules in a run of so many steps; none where nothing is known of them."""
    config, critic = checked.config, role_named(checked.roles, "critic")
    if isinstance(config, PPOConfig) and critic and num_steps and config.critic.warmup_steps >= num_steps:
        allowed = f"must be less than the run's {num_steps} steps, or the actor never trains"
        yield Problem("critic.warmup_steps", config.critic.warmup_steps, allowed, "critic.warmup_steps=0")
    elif config.trainer.strict:
        yield from cut_warm_ups(checked, num_steps)


def cut_warm_ups(checked: CheckedRun[C], num_steps: int | None) -> Iterator[Problem]:
    """Yield the warm-ups that a run of so many steps is too short for; none where nothing is known of them."""
    for role in with_total_steps(checked.config, checked.roles, num_steps) if num_steps else ():
        training = role.training
        if training and training.warmup_ratio is None and training.warmup_steps > training.warm_up:
            allowed = f"is cut to {training.warm_up}: the run has {training.total_steps} optimizer steps"
            key = role.at("lr_scheduler.warmup_steps")
            yield Problem(key, training.warmup_steps, allowed, "lower it, or train longer")


def without_effect(checked: CheckedRun[C], num_steps: int | None) -> list[Problem]:
    """Return the Problems of settings that do nothing in a run of so many steps, to be said where it starts."""
    return [*checked.idle, *cut_warm_ups(checked, num_steps)]


def _checked_roles(config: PPOConfig | SFTConfig, found: Findings, platform: PlatformName) -> tuple[Role, ...]:
    """Return the roles of a run, of which those facts are missing that could not be found; note all problems."""
    known: dict[str, ModelFacts] = {}

    def find(facts: ModelFacts) -> ModelFacts:
        if facts.key not in known:
            known[facts.key] = facts
            if facts.path:
                with found.of(f"{facts.key}.path", facts.path):
                    known[facts.key] = _found(facts, found.notes, read_shape if has_fsdp(config) else read_model_shape)
        return known[facts.key]

    roles = roles_of(config, find)
    found.problems += run_problems(config, roles, platform)
    for role in roles:
        if role.training:
            of_a_step = "ppo_mini_batch_size" if isinstance(config, PPOConfig) else "data.train_batch_size"
            with found.of(role.at(of_a_step), role.training.mini_batch_size):
                batch_plan(config, role)
    found.problems += model_problems(config, roles, platform)
    model = roles[0].model
    with found.of(f"{model.key}.path", model.path):
        found.problems += _the_embedding_holds_the_tokenizer(model)
    return roles


def _found(facts: ModelFacts, notes: list[str] | None, read: Callable[[str, str], ModelShape]) -> ModelFacts:
    """Return the facts of a model in a folder. notes: where given, those that megarl ships may stand for them.

    read: returns the shape of a folder.
    """
    assert facts.path is not None
    try:
        folder = resolve_model_folder(facts.path, f"{facts.key}.path")
    except ModelFolderError as error:
        if notes is None:
            raise
        shipped = shipped_config(facts.path)
        if shipped is None:
            hint = nearest_shipped(facts.path)
            raise ModelFolderError(f"{error}; megarl ships no facts of it either. {hint}".rstrip()) from error
        notes.append(
            f"{facts.key}.path: {facts.path} isn't on this machine: its weights and tokenizer are unread, its sizes "
            "are megarl's own facts"
        )
        return replace(facts, known_shape=parse_model_shape(shipped, facts.path))
    shape = read(folder, f"{facts.key}.path")
    is_read_as_text = facts.key != "reward.model"
    if is_read_as_text and not any((Path(folder) / name).is_file() for name in _TOKENIZER_FILES):
        raise ModelFolderError(
            f"{folder} has no tokenizer: none of {', '.join(_TOKENIZER_FILES)}; copy it from the base model"
        )
    return replace(facts, known_shape=shape, folder=folder)


def _the_embedding_holds_the_tokenizer(model: ModelFacts) -> Iterator[Problem]:
    """Yield a tokenizer with a token that the model has no embedding of. model: the one whose tokenizer is used."""
    if model.folder is None or (largest := largest_token(model.folder)) is None:
        return
    number, token = largest
    if number >= model.shape.vocab_size:
        allowed = (
            f"its tokenizer has token {number}, {token!r}, but its embedding only the {model.shape.vocab_size} of "
            "config.json's vocab_size, counted from 0"
        )
        fix = "take the tokenizer that the model was trained with, or resize the embedding"
        yield Problem(f"{model.key}.path", model.path, allowed, fix)


def _a_token_means_the_same(roles: Sequence[Role]) -> Iterator[Problem]:
    """Yield what the reward model would misread: it is given the actor's tokens as numbers."""
    actor, reward_model = roles[0].model, role_named(roles, "reward_model")
    if reward_model is None or actor.folder is None or reward_model.model.folder is None:
        return
    if difference := differing_token(actor.folder, reward_model.model.folder):
        allowed = f"has another vocabulary than the actor: {difference}; it is given the actor's tokens as they are"
        fix = "take a reward model made from a model of the actor's family"
        yield Problem("reward.model.path", reward_model.model.path, allowed, fix)


def _optimizers_are_installed(roles: Sequence[Role]) -> Iterator[Problem]:
    """Yield the roles that ask for an optimizer that isn't here."""
    for role in roles:
        backend = role.backend
        if not isinstance(backend, TrainedMegatronConfig) or not backend.use_precision_aware_optimizer:
            continue
        if find_spec("transformer_engine") is None:
            name = f"{role.backend_key}.use_precision_aware_optimizer"
            allowed = "is Transformer Engine's Adam, which isn't installed"
            yield Problem(name, True, allowed, f"pip install 'megarl[gpu]' where there are GPUs, or {name}=false")


def _adapters_are_installed(roles: Sequence[Role]) -> Iterator[Problem]:
    """Yield the roles that ask for adapters where peft, which makes them, isn't here."""
    for role in roles:
        if role.lora and find_spec("peft") is None:
            allowed = "is made by peft, which isn't installed"
            yield Problem(f"{role.model.key}.lora_rank", role.lora.rank, allowed, "pip install 'megarl[lora]'")


def _check_reward(config: PPOConfig, found: Findings) -> None:
    """Check that the reward function exists; a file of the user's is read and not run before the run starts."""
    name, path = config.reward.name, config.reward.path
    if path is not None and not (path.endswith(".py") and Path(path).expanduser().is_file()):
        found.problems.append(Problem("reward.path", path, "there is no such .py file", "correct the path"))
    elif path is not None:
        with found.of("reward.path", path):
            check_reward_file(path, config.reward.function)
            if found.notes is not None:
                found.notes.append(f"reward.path: {path} is read and not run: a run tries its function at the start")
    elif name is not None:
        with found.of("reward.name", name):
            load_reward(name)
    if found.notes is not None and config.algorithm.path is not None:
        found.notes.append(f"algorithm.path: {config.algorithm.path} is not loaded: a run does so at its start")
