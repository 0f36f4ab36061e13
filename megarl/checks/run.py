"""All that can be known of a run before it starts, checked together: keys, rules, batches, models, data files.

Loads neither torch nor ray, so that a mistake costs a second or two.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megarl.batching.plan import BatchPlan, plan_batch
from megarl.checks.algorithm import needs_critic
from megarl.checks.passes import PassSize, actor_update, critic_update
from megarl.checks.rules import (
    critic_model_problems,
    num_ranks,
    ppo_model_problems,
    ppo_problems,
    reward_model_problems,
    schedule_problems,
    sft_model_problems,
    sft_problems,
    without_followers,
)
from megarl.checks.tokenizer_file import differing_token
from megarl.config.build import build_config
from megarl.config.schema import (
    FSDP_STRATEGIES,
    ActorConfig,
    CriticConfig,
    DpPPOConfig,
    PPOConfig,
    SFTConfig,
    TrainedMegatronConfig,
)
from megarl.data.parquet import check_footer
from megarl.data.prompts import prompt_columns
from megarl.errors import ConfigError, MegarlError, ModelFolderError, Problem
from megarl.parallel.layout import layout_of
from megarl.reward.registry import load_reward
from megarl.weights.folder import resolve_model_folder
from megarl.weights.model_facts.shipped import shipped_config
from megarl.weights.model_shape import ModelShape, parse_model_shape, read_model_shape

_MODEL, _CRITIC, _REWARD = "actor_rollout_ref.model.path", "critic.model.path", "reward.model.path"


@dataclass(frozen=True)
class Model:
    """A model of a run. folder: None where this machine has only the facts of its architecture."""

    shape: ModelShape
    folder: str | None

    def here(self) -> str:
        """Return the folder of a model that a run is about to load."""
        assert self.folder is not None, "a run is checked with its files"
        return self.folder


@dataclass(frozen=True)
class CheckedPPO:
    """An RL run without a known mistake. critic and critic_batch, reward_model: None without one.

    num_prompts: rows of the training files, before too long ones are left out; None where they aren't here. notes: what
    couldn't be checked on this machine.
    """

    config: PPOConfig
    model: Model
    critic: Model | None
    batch: BatchPlan
    critic_batch: BatchPlan | None
    num_prompts: int | None
    notes: tuple[str, ...] = ()
    reward_model: Model | None = None

    @property
    def num_steps(self) -> int | None:
        """Steps of the run, None where nothing here says so."""
        trainer = self.config.trainer
        if trainer.total_training_steps or self.num_prompts is None:
            return trainer.total_training_steps
        return trainer.total_epochs * (self.num_prompts // self.config.data.train_batch_size)


@dataclass(frozen=True)
class CheckedSFT:
    """An SFT run without a known mistake."""

    config: SFTConfig
    model: Model
    batch: BatchPlan


class _Findings:
    """Problems and errors so far. A single error stays what it is; several become one ConfigError."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.errors: list[tuple[str, object, MegarlError]] = []

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


def check_ppo(values: Mapping[str, Any], *, files_may_be_missing: bool = False) -> CheckedPPO:
    """Check an RL run. Raises the named error of all that is wrong.

    files_may_be_missing: for a plan made far from the cluster; weights and data files are then noted as unchecked, and
    a model that isn't here is taken from the architectures that megarl ships.
    """
    config = _built(values)
    found, notes = _Findings(), list[str]()
    found.problems += ppo_problems(config)
    batch = critic_plan = model = critic = reward_model = None
    with found.of("actor_rollout_ref.actor.ppo_mini_batch_size", config.actor_rollout_ref.actor.ppo_mini_batch_size):
        batch = actor_batch(config)
    if needs_critic(config):
        with found.of("critic.ppo_mini_batch_size", config.critic.ppo_mini_batch_size):
            critic_plan = critic_batch(config)
    if path := config.actor_rollout_ref.model.path:
        with found.of(_MODEL, path):
            model = _model(path, notes if files_may_be_missing else None)
            found.problems += ppo_model_problems(config, model.shape)
    if needs_critic(config) and (path := config.critic.model.path):
        with found.of(_CRITIC, path):
            critic = _model(path, notes if files_may_be_missing else None)
            if model:
                found.problems += critic_model_problems(config, critic.shape, model.shape.vocab_size)
    if (path := config.reward.model.path) is not None:
        with found.of(_REWARD, path):
            reward_model = _reward_model(path, notes if files_may_be_missing else None)
            if model:
                found.problems += reward_model_problems(config, reward_model.shape, model.shape.vocab_size)
                found.problems += _a_token_means_the_same(model, reward_model, path)
    num_prompts = _check_data_files(config, found, notes if files_may_be_missing else None)
    _check_reward(config, found)
    trained = {"actor_rollout_ref.actor.megatron": config.actor_rollout_ref.actor.megatron}
    if needs_critic(config):
        trained["critic.megatron"] = config.critic.megatron
    if not files_may_be_missing:
        found.problems += _optimizers_are_installed(trained)
    found.problems = without_followers(found.problems)
    found.finish()
    assert batch is not None and model is not None
    checked = CheckedPPO(config, model, critic, batch, critic_plan, num_prompts, tuple(notes), reward_model)
    found.problems += _schedule_problems(checked)
    found.finish()
    return checked


def check_sft(values: Mapping[str, Any]) -> CheckedSFT:
    """Check an SFT run. Raises the named error of all that is wrong."""
    config = build_config(SFTConfig, values)
    found = _Findings()
    found.problems += sft_problems(config)
    batch = model = None
    with found.of("data.train_batch_size", config.data.train_batch_size):
        batch = sft_batch(config)
    if path := config.model.path:
        with found.of("model.path", path):
            model = _model(path, None)
            found.problems += sft_model_problems(config, model.shape)
    found.problems += _optimizers_are_installed({"megatron": config.megatron})
    columns = {config.data.messages_key: f"data.messages_key = {config.data.messages_key!r}"}
    for file in (*config.data.train_files, *config.data.val_files):
        with found.of("data.train_files or data.val_files", file):
            check_footer(file, columns)
    found.finish()
    assert batch is not None and model is not None
    return CheckedSFT(config, model, batch)


def actor_batch(config: PPOConfig) -> BatchPlan:
    """Return the actor's batch arithmetic. Raises ConfigError where it doesn't come out even."""
    actor = config.actor_rollout_ref.actor
    return _batch(config, actor, "actor_rollout_ref.actor", actor_update(config))


def critic_batch(config: PPOConfig) -> BatchPlan:
    """Return the critic's, likewise."""
    return _batch(config, config.critic, "critic", critic_update(config))


def sft_batch(config: SFTConfig) -> BatchPlan:
    """Return the batch arithmetic of an SFT run: an optimizer step is a step. Raises ConfigError likewise."""
    size, ranks = config.data.train_batch_size, num_ranks(config)
    return plan_batch(
        num_prompts=size,
        n=1,
        mini_batch_size=size,
        micro_batch_size=config.data.micro_batch_size_per_gpu,
        dp_size=max(1, layout_of(config.megatron, ranks).dp),
    )


def _batch(config: PPOConfig, role: ActorConfig | CriticConfig, name: str, size: PassSize) -> BatchPlan:
    """Return a role's batch arithmetic; axes that don't divide the ranks are for another rule to report."""
    return plan_batch(
        num_prompts=config.data.train_batch_size,
        n=config.actor_rollout_ref.rollout.n,
        mini_batch_size=role.ppo_mini_batch_size,
        micro_batch_size=size.micro_batch_size,
        dp_size=max(1, layout_of(role.megatron, num_ranks(config)).dp),
        epochs=role.ppo_epochs,
        role=name,
        max_tokens=size.max_tokens,
    )


def _built(values: Mapping[str, Any]) -> PPOConfig:
    """Return the config, if its backend is built."""
    actor = _at(values, "actor_rollout_ref", "actor")
    strategy = _at(actor, "strategy")
    if strategy in FSDP_STRATEGIES:
        if _at(actor, "megatron") is None:
            build_config(DpPPOConfig, values)
        key, fix = (
            "actor_rollout_ref.actor.strategy",
            "--config-name=ppo_megatron_trainer, or `defaults: [ppo_megatron_trainer, _self_]`",
        )
        raise ConfigError([Problem(key, strategy, "this backend isn't built yet; megatron is", fix)])
    return build_config(PPOConfig, values)


def _at(values: object, *path: str) -> object:
    for name in path:
        values = values.get(name) if isinstance(values, Mapping) else None
    return values


def _model(path: str, notes: list[str] | None, *, needs_tokenizer: bool = True) -> Model:
    """Return a model. notes: where given, an absent folder is noted and its shipped facts are taken."""
    try:
        folder = resolve_model_folder(path)
    except ModelFolderError:
        facts = shipped_config(path) if notes is not None else None
        if notes is None or facts is None:
            raise
        notes.append(
            f"{path} isn't on this machine: its weights and tokenizer are unchecked, its sizes are megarl's own facts"
        )
        return Model(parse_model_shape(facts, path), None)
    shape = read_model_shape(folder)
    tokenizer = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    if needs_tokenizer and not any((Path(folder) / name).is_file() for name in tokenizer):
        raise ModelFolderError(
            f"{folder} has no tokenizer: none of {', '.join(tokenizer)}; copy it from the base model"
        )
    return Model(shape, folder)


def _reward_model(path: str, notes: list[str] | None) -> Model:
    """Return a reward model, likewise; the shipped facts of a language model stand for those of one made from it."""
    model = _model(path, notes, needs_tokenizer=False)
    return model if model.folder is not None else replace(model, shape=model.shape.with_value_head())


def _a_token_means_the_same(actor: Model, reward_model: Model, path: str) -> Iterator[Problem]:
    """Yield what the reward model would misread: it is given the actor's tokens as numbers."""
    if actor.folder is None or reward_model.folder is None:
        return
    if difference := differing_token(actor.folder, reward_model.folder):
        allowed = f"has another vocabulary than the actor: {difference}; it is given the actor's tokens as they are"
        yield Problem(_REWARD, path, allowed, "take a reward model made from a model of the actor's family")


def _optimizers_are_installed(trained: Mapping[str, TrainedMegatronConfig]) -> Iterator[Problem]:
    """Yield which roles, by the key of their axes, ask for an optimizer that isn't here."""
    for key, megatron in trained.items():
        if megatron.use_precision_aware_optimizer and find_spec("transformer_engine") is None:
            name = f"{key}.use_precision_aware_optimizer"
            allowed = "is Transformer Engine's Adam, which isn't installed"
            yield Problem(name, True, allowed, f"pip install 'megarl[gpu]' where there are GPUs, or {name}=false")


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


def _schedule_problems(checked: CheckedPPO) -> Iterator[Problem]:
    """Yield what is wrong with the schedules, by the rows that the files have."""
    config, steps = checked.config, checked.num_steps
    if not steps:
        return
    idle = config.critic.warmup_steps if checked.critic_batch else 0
    if idle >= steps:
        allowed = f"must be less than the run's {steps} steps, or the actor never trains"
        yield Problem("critic.warmup_steps", idle, allowed, "critic.warmup_steps=0")
        return
    actor_steps = (steps - idle) * checked.batch.num_optimizer_steps
    yield from schedule_problems(
        "actor_rollout_ref.actor.lr_scheduler", config.actor_rollout_ref.actor.lr_scheduler, actor_steps
    )
    if checked.critic_batch:
        critic_steps = steps * checked.critic_batch.num_optimizer_steps
        yield from schedule_problems("critic.lr_scheduler", config.critic.lr_scheduler, critic_steps)
