"""All that can be known of a run before it starts, checked together: keys, rules, batches, models, data files.

Loads neither torch nor ray, so that a mistake costs a second or two.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Generic, TypeVar

from megarl.batching.plan import BatchPlan
from megarl.checks.backends import every_role_has_one_backend
from megarl.checks.rules import model_problems, run_problems, warm_up_ends_before_the_run
from megarl.checks.tokenizer_file import differing_token, largest_token
from megarl.config.build import build_config
from megarl.config.schema import PPOConfig, SFTConfig, TrainedMegatronConfig
from megarl.data.parquet import check_footer
from megarl.data.prompts import prompt_columns
from megarl.errors import ConfigError, MegarlError, ModelFolderError, Problem
from megarl.parallel.environment import PlatformName, platform_name
from megarl.reward.registry import load_reward
from megarl.roles import ModelFacts, Role, batch_plan, role_named, roles_of
from megarl.weights.folder import resolve_model_folder
from megarl.weights.model_facts.shipped import nearest_shipped, shipped_config
from megarl.weights.model_shape import parse_model_shape, read_model_shape

C = TypeVar("C", PPOConfig, SFTConfig)

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class CheckedRun(Generic[C]):
    """A run without a known mistake.

    num_rows: rows of the training files, before too long ones are left out; None where they aren't here. notes: what
    couldn't be checked on this machine.
    """

    config: C
    roles: tuple[Role, ...]
    num_rows: int | None = None
    notes: tuple[str, ...] = ()

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


class _Findings:
    """Problems and errors so far. A single error stays what it is; several become one ConfigError.

    notes: where given, absent files are noted there instead.
    """

    def __init__(self, notes: list[str] | None = None) -> None:
        self.problems: list[Problem] = []
        self.errors: list[tuple[str, object, MegarlError]] = []
        self.notes = notes

    @contextmanager
    def of(self, key: str, value: object) -> Iterator[None]:
        """Keep what goes wrong inside, as said by ``key``."""
        try:
            yield
        except ConfigError as error:
            self.problems += error.problems
        except MegarlError as error:
            self.errors.append((key, value, error))

    def finish(self) -> None:
        """Raise what was found, if anything."""
        if len(self.errors) == 1 and not self.problems:
            raise self.errors[0][2]
        problems = [*self.problems, *(Problem(key, value, str(error)) for key, value, error in self.errors)]
        if problems:
            raise ConfigError(problems)


def check_ppo(
    values: Mapping[str, Any], *, files_may_be_missing: bool = False, platform: PlatformName | None = None
) -> CheckedRun[PPOConfig]:
    """Check an RL run. Raises the named error of all that is wrong.

    files_may_be_missing: for a plan made far from the cluster; weights and data files are then noted as unchecked, and
    a model that isn't here is taken from the architectures that megarl ships. platform: of the run; unless given this
    machine's, and cuda where files may be missing.
    """
    config = _built(values)
    found = _Findings([] if files_may_be_missing else None)
    platform = platform or ("cuda" if files_may_be_missing else platform_name())
    roles = _checked_roles(config, found, platform)
    found.problems += _a_token_means_the_same(roles)
    num_rows = _check_data_files(config, found, found.notes)
    _check_reward(config, found)
    if not files_may_be_missing:
        found.problems += _optimizers_are_installed(roles)
        found.problems += _adapters_are_installed(roles)
    found.finish()
    checked = CheckedRun(config, roles, num_rows, tuple(found.notes or ()))
    found.problems += schedule_problems(checked, checked.num_steps)
    found.finish()
    return checked


def check_sft(values: Mapping[str, Any]) -> CheckedRun[SFTConfig]:
    """Check an SFT run. Raises the named error of all that is wrong."""
    config = build_config(SFTConfig, values)
    found = _Findings()
    roles = _checked_roles(config, found, platform_name())
    found.problems += _optimizers_are_installed(roles)
    found.problems += _adapters_are_installed(roles)
    columns = {config.data.messages_key: f"data.messages_key = {config.data.messages_key!r}"}
    for file in (*config.data.train_files, *config.data.val_files):
        with found.of("data.train_files or data.val_files", file):
            check_footer(file, columns)
    found.finish()
    return CheckedRun(config, roles)


def schedule_problems(checked: CheckedRun[PPOConfig], num_steps: int | None) -> Iterator[Problem]:
    """Yield the problems of the schedules in a run of so many steps; none where nothing is known of them."""
    if not num_steps:
        return
    critic, batches = role_named(checked.roles, "critic"), checked.batches
    idle = checked.config.critic.warmup_steps if critic else 0
    if idle >= num_steps:
        allowed = f"must be less than the run's {num_steps} steps, or the actor never trains"
        yield Problem("critic.warmup_steps", idle, allowed, "critic.warmup_steps=0")
        return
    yield from warm_up_ends_before_the_run(checked.actor, (num_steps - idle) * batches["actor"].num_optimizer_steps)
    if critic:
        yield from warm_up_ends_before_the_run(critic, num_steps * batches["critic"].num_optimizer_steps)


def _checked_roles(config: PPOConfig | SFTConfig, found: _Findings, platform: PlatformName) -> tuple[Role, ...]:
    """Return the roles of a run, of which those facts are missing that could not be found; note all problems."""
    known: dict[str, ModelFacts] = {}

    def find(facts: ModelFacts) -> ModelFacts:
        if facts.key not in known:
            known[facts.key] = facts
            if facts.path:
                with found.of(f"{facts.key}.path", facts.path):
                    known[facts.key] = _found(facts, found.notes)
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


def _built(values: Mapping[str, Any]) -> PPOConfig:
    """Return the config, if every role has the section of one backend."""
    config = build_config(PPOConfig, values)
    problems = list(every_role_has_one_backend(config))
    if problems:
        raise ConfigError(problems)
    return config


def _found(facts: ModelFacts, notes: list[str] | None) -> ModelFacts:
    """Return the facts of a model in a folder. notes: where given, those that megarl ships may stand for them."""
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
            f"{facts.path} isn't on this machine: its weights and tokenizer are unchecked, its sizes are megarl's own "
            "facts"
        )
        return replace(facts, known_shape=parse_model_shape(shipped, facts.path))
    shape = read_model_shape(folder, f"{facts.key}.path")
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


def _check_reward(config: PPOConfig, found: _Findings) -> None:
    """Check that the reward function exists; a file of the user's isn't run before the run starts."""
    name, path = config.reward.name, config.reward.path
    if path is not None:
        if not (path.endswith(".py") and Path(path).expanduser().is_file()):
            found.problems.append(Problem("reward.path", path, "there is no such .py file", "correct the path"))
    elif name is not None:
        with found.of("reward.name", name):
            load_reward(name)


def _check_data_files(config: PPOConfig, found: _Findings, notes: list[str] | None) -> int | None:
    """Check that data files are there with their columns; return the rows of the training files."""
    columns, rows = prompt_columns(config.data.prompt_key), 0
    for key, files in (("data.train_files", config.data.train_files), ("data.val_files", config.data.val_files)):
        if not files:
            found.problems.append(Problem(key, [], "must name at least one parquet file", f"{key}=FILE.parquet"))
        for file in files:
            if notes is not None and not Path(file).expanduser().exists():
                notes.append(f"{file} isn't on this machine: its rows and columns are unchecked")
                rows = -1 if key == "data.train_files" else rows
                continue
            with found.of(key, file):
                count = check_footer(file, columns)
                rows += count if key == "data.train_files" and rows >= 0 else 0
    if 0 < rows < config.data.train_batch_size:
        allowed = f"the training files have only {rows} rows, not enough for one step"
        found.problems.append(
            Problem("data.train_batch_size", config.data.train_batch_size, allowed, f"data.train_batch_size={rows}")
        )
    return rows if rows > 0 else None
