from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from megarl.config.command_line import FlagParser, parse_command_line, take_flags
from megarl.config.compose import as_yaml, compose, run_hydra
from megarl.config.programs import PPO, PROGRAMS, SFT, recipes_of
from megarl.errors import ConfigError, Problem
from megarl.monitor.rundir import run_folder

QUICKSTART_BATCH, QUICKSTART_N = 64, 8
MINE = "--config-dir=.", "--config-name=mine"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def composed(*arguments: str, config_name: str = "ppo_trainer") -> dict[str, Any]:
    return compose(parse_command_line(arguments, config_name)).values()


def reported(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What is printed where the arguments are wrong: one error, no traceback, exit code 2."""

    def never(values: Mapping[str, Any], overrides: Sequence[str]) -> None:
        pytest.fail(f"it composed, with {overrides}")

    with pytest.raises(SystemExit) as left:
        run_hydra("ppo_trainer", never, arguments)
    printed = capsys.readouterr()
    assert left.value.code == 2
    assert not printed.out
    assert printed.err.startswith("ConfigError: ")
    assert "Traceback" not in printed.err and "HYDRA_FULL_ERROR" not in printed.err and "hydra.cc" not in printed.err
    return printed.err


@pytest.mark.parametrize("sign", ["", "+", "++"])
def test_a_recipe_is_picked_with_and_without_plus(sign: str) -> None:
    values = composed(f"{sign}experiment=quickstart")
    assert values["data"]["train_batch_size"] == QUICKSTART_BATCH
    assert values["actor_rollout_ref"]["rollout"]["n"] == QUICKSTART_N


@pytest.mark.parametrize("sign", ["", "+", "++"])
@pytest.mark.parametrize("key", ["data.train_batch_size", "data.nobody_knows", "no.such.section"])
def test_a_value_is_set_whether_or_not_its_key_exists_for_the_checks_to_judge(sign: str, key: str) -> None:
    node: Any = composed(f"{sign}{key}=7")
    for part in key.split("."):
        node = node[part]
    assert node == 7


@pytest.mark.parametrize("base", ["ppo_trainer", "ppo_megatron_trainer"])
@pytest.mark.parametrize("ending", ["", ".yaml"])
def test_a_file_of_the_users_own_starts_from_ours(base: str, ending: str, folder: Path) -> None:
    (folder / "my_config.yaml").write_text(f"defaults: [{base}, _self_]\ndata: {{train_batch_size: 5}}\n")
    (folder / "other.yaml").write_text("{ not: read")
    (folder / "data").mkdir()
    values = composed("--config-dir=.", f"--config-name=my_config{ending}", "actor_rollout_ref.rollout.n=3")
    assert values["data"]["train_batch_size"] == 5
    assert values["actor_rollout_ref"]["rollout"]["n"] == 3
    assert values["data"]["max_prompt_length"] == composed(config_name=base)["data"]["max_prompt_length"]
    assert ("megatron" in values["actor_rollout_ref"]["actor"]) == (base == "ppo_megatron_trainer")


def test_the_command_line_picks_a_recipe_over_the_users_own_file(folder: Path) -> None:
    (folder / "mine.yaml").write_text("defaults: [ppo_megatron_trainer, _self_]\ndata: {train_batch_size: 5}\n")
    assert composed(*MINE)["data"]["train_batch_size"] == 5
    assert composed(*MINE, "experiment=quickstart")["data"]["train_batch_size"] == QUICKSTART_BATCH
    assert composed(*MINE, "experiment=quickstart", "data.train_batch_size=9")["data"]["train_batch_size"] == 9


def test_a_recipe_that_a_file_has_chosen_is_replaced_or_taken_away(folder: Path) -> None:
    (folder / "mine.yaml").write_text("defaults: [ppo_trainer, override experiment: gsm8k_tiny]\n")
    recipe = "trainer", "experiment_name"
    for arguments, name in (((), "gsm8k_tiny"), (("experiment=quickstart",), "quickstart"), (("~experiment",), "ppo")):
        values = composed(*MINE, *arguments)
        assert values[recipe[0]][recipe[1]] == name


def test_a_recipe_of_the_users_own_needs_no_header(folder: Path) -> None:
    (folder / "experiment").mkdir()
    (folder / "experiment/small.yaml").write_text("data: {train_batch_size: 6}\n")
    assert composed("--config-dir=.", "experiment=small")["data"]["train_batch_size"] == 6


def test_a_file_without_self_has_the_last_word_and_no_warning(folder: Path, recwarn: pytest.WarningsRecorder) -> None:
    (folder / "mine.yaml").write_text("defaults: [ppo_trainer]\ndata: {train_batch_size: 5}\n")
    assert composed(*MINE)["data"]["train_batch_size"] == 5
    assert not [str(w.message) for w in recwarn if "_self_" in str(w.message)]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["experiment=quikstart"], ["experiment = 'quikstart'  (command line): no such file", "'quickstart'?"]),
        (["--config-name=ppo_megatron_trianer"], ["no such file", "did you mean 'ppo_megatron_trainer'?"]),
        (["--config-name=mine"], ["--config-name = 'mine': no such file", "--config-dir=FOLDER --config-name=FILE"]),
        (["--config-dir=nowhere"], ["--config-dir", "is no folder"]),
        (["--confg-dir=."], ["no such flag", "did you mean '--config-dir'?"]),
        (["--multirun"], ["--multirun: no such flag"]),
        (["--cfg", "all"], ["--cfg", "invalid choice: 'all'"]),
        (["--resolve"], ["--resolve: has no effect without --cfg job"]),
        (["data.prompt_key='abc"], ["data.prompt_key='abc: ", "quotes"]),
        (["data.train_files[0]=x"], ["data.train_files[0]=x: ", "fix: "]),
        (["word"], ["word: is neither key=value nor a flag"]),
        (["=3"], ["=3: has no key"]),
        (["a.b=1,2"], ["a.b = '1,2': is several values", "key='[a,b]'"]),
        (["experiment=quickstart", "+experiment=gsm8k_tiny"], ["+experiment=gsm8k_tiny", "Multiple values for exp"]),
        (["hydra.run.dir=x"], ["hydra.run.dir=x: has no effect"]),
        (["~data.trian_batch_size"], ["~data.trian_batch_size  (command line): can't be", "does not exist"]),
        (
            ["critic.shuffle=${no.key}", "~critic.shuffle=true"],
            ["~critic.shuffle=true  (command line)", "'no.key' not"],
        ),
        (["~data.prompt_key=other"], ["~data.prompt_key=other  (command line)", "is prompt and not other"]),
        (
            ["~actor_rollout_ref.actor.shuffle"],
            ["critic.shuffle = ", "actor_rollout_ref.actor.shuffle at command line"],
        ),
        (["~critic=megatron_critic"], ["~critic=megatron_critic  (command line): can't be"]),
        (["model=hf_model"], ["model=hf_model  (command line)", "override model@actor_rollout_ref.model"]),
        (["nothing@x=3"], ["nothing@x=3  (command line)", "'nothing' does not exist"]),
        (["data=3"], ["data = 3: must be the name of a file", "legacy_data"]),
        (["critic=null"], ["critic = None: must be the name of a file", "dp_critic"]),
        (["data.train_batch_size=${no.key}"], ["Interpolation key 'no.key' not found", "(command line)"]),
        (["data.prompt_key=???"], ["data.prompt_key", "(command line)"]),
    ],
)
def test_a_mistake_on_the_command_line_is_one_clear_error(
    arguments: list[str], told: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    error = reported(capsys, *arguments)
    assert all(part in error for part in told), error


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("defaults: [ppo_trianer, _self_]\n", ["'ppo_trianer'  (mine.yaml:1): no such file", "'ppo_trainer'?"]),
        (
            "defaults:\n  - ppo_trainer\n  - override actor@actor_rollout_ref.actor: megatron_acter\n",
            ["'actor/megatron_acter'  (mine.yaml:3): no such file", "did you mean 'megatron_actor'?"],
        ),
        ("defaults: [ppo_trainer]\ndata: {a: 1\nx: 3\n", ["mine.yaml:3 = 'x: 3': is not YAML"]),
        ("defaults: [ppo_trainer]\ndata:\n  a: 1\n  a: 2\n", ["mine.yaml:4", "duplicate key a"]),
        ("defaults: [ppo_trainer]\ndata:\n\tb: 1\n", ["mine.yaml:3", "is not YAML"]),
        ("defaults: [mine, _self_]\n", ["has itself in its defaults"]),
        ("defaults: ppo_trainer\n", ["(mine.yaml)", "defaults must be a list"]),
        ("defaults: [ppo_trainer]\ndata: [1]\n", ["(mine.yaml)", "Cannot merge"]),
        ('defaults: [ppo_trainer]\ndata:\n  prompt_key: "${x"\n', ["data.prompt_key", "(mine.yaml:3)"]),
        ("defaults: [ppo_trainer]\ndata:\n  new_key: ???\n", ["data.new_key", "(mine.yaml:3)"]),
        ("- a\n", ["(mine.yaml)", "ListConfig"]),
        ("# @package a b c\ndefaults: [ppo_trainer]\n", ["(mine.yaml)", "@package a b c"]),
    ],
)
def test_a_mistake_in_the_users_own_file_names_the_file(
    text: str, told: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "mine.yaml").write_text(text)
    error = reported(capsys, *MINE)
    assert all(part in error for part in told), error


def test_a_file_of_the_users_comes_before_one_of_ours_of_the_same_name(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "experiment").mkdir()
    (folder / "experiment/quickstart.yaml").write_text("data: {train_batch_size: 5}\n")
    assert composed("--config-dir=.", "experiment=quickstart")["data"]["train_batch_size"] == 5
    (folder / "ppo_trainer.yaml").write_text("defaults: [ppo_trainer]\n")
    assert "has itself in its defaults" in reported(capsys, "--config-dir=.")


def test_all_mistakes_on_the_command_line_are_reported_together(capsys: pytest.CaptureFixture[str]) -> None:
    error = reported(capsys, "--confg-dir=.", "word", "a.b=1,2", "hydra.verbose=true", "x='")
    assert error.startswith("ConfigError: 5 problems in the configuration:\n  1. --confg-dir=.: no such flag")


@pytest.mark.parametrize("bug", [ValueError, TypeError, KeyError, AssertionError, OSError])
@pytest.mark.parametrize(
    "place", ["compose._for_hydra", "compose.open_dict", "command_line._override", "files._places"]
)
def test_a_bug_of_ours_keeps_its_name_and_its_traceback(
    bug: type[Exception], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise bug("planted")

    monkeypatch.setattr(f"megarl.config.{place}", fail)
    with pytest.raises(bug, match="planted") as caught:
        run_hydra(
            "ppo_trainer", lambda *_: None, ["experiment=quickstart", "data.train_batch_size=3", "critic=dp_critic"]
        )
    assert caught.type is bug


def test_an_error_is_told_even_where_its_file_has_changed_since(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "mine.yaml").write_text("defaults: [ppo_trainer]\n")

    def refuse(values: Mapping[str, Any], overrides: Sequence[str]) -> None:
        (folder / "mine.yaml").write_text("defaults: [")
        raise ConfigError([Problem("data.train_batch_size", 0, "wrong")])

    with pytest.raises(SystemExit):
        run_hydra("ppo_trainer", refuse, MINE)
    assert "1. data.train_batch_size = 0: wrong" in capsys.readouterr().err


def test_an_error_of_the_task_says_where_its_values_came_from(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "mine.yaml").write_text(
        "defaults: [ppo_trainer, _self_]\ndata:\n  train_batch_size: 3\nactor_rollout_ref: {actor: {shuffle: 5}}\n"
    )

    def refuse(values: Mapping[str, Any], overrides: Sequence[str]) -> None:
        keys = ("data.train_batch_size", "trainer.nnodes", "critic.shuffle", "no.such", "trainer.nnodes x trainer.seed")
        raise ConfigError([Problem(key, 0, "wrong") for key in keys])

    with pytest.raises(SystemExit) as left:
        run_hydra("ppo_trainer", refuse, [*MINE, "trainer.nnodes=2", "trainer.seed=1"])
    assert left.value.code == 2
    lines = capsys.readouterr().err.splitlines()[1:]
    assert lines[0] == "  1. data.train_batch_size = 0  (mine.yaml:3): wrong"
    assert lines[1] == "  2. trainer.nnodes = 0  (command line): wrong"
    assert lines[2].startswith("  3. critic.shuffle = 0  (conf/critic/common.yaml:")
    assert lines[2].endswith(", from actor_rollout_ref.actor.shuffle at mine.yaml:4): wrong")
    assert lines[3] == "  4. no.such = 0: wrong"
    assert lines[4].endswith("(trainer.nnodes: command line; trainer.seed: command line): wrong")


def test_the_task_gets_values_and_the_overrides_as_typed() -> None:
    got: list[tuple[int, tuple[str, ...]]] = []
    typed = ("+experiment=quickstart", "++data.train_batch_size=9", "~data.val_shuffle")
    run_hydra("ppo_trainer", lambda v, o: got.append((v["data"]["train_batch_size"], tuple(o))), typed)
    assert got == [(9, typed)]


@pytest.mark.parametrize("resolve", [True, False])
def test_the_composed_config_is_printed_without_running(resolve: bool, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["data.train_batch_size=3", "--cfg", "job", *(["--resolve"] if resolve else [])]
    run_hydra("ppo_trainer", lambda *_: pytest.fail("it ran"), arguments)
    values = yaml.safe_load(capsys.readouterr().out)
    assert values["data"]["train_batch_size"] == 3
    assert values["critic"]["shuffle"] == (True if resolve else "${actor_rollout_ref.actor.shuffle}")
    assert "hydra" not in values


def test_a_value_may_name_what_hydra_knows(folder: Path) -> None:
    assert composed("trainer.run_dir=${hydra:runtime.cwd}/x")["trainer"]["run_dir"] == f"{folder}/x"


def test_help_says_how_a_run_is_started(capsys: pytest.CaptureFixture[str]) -> None:
    run_hydra("ppo_trainer", lambda *_: pytest.fail("it ran"), ["--help"])
    text = capsys.readouterr().out
    assert "experiment=NAME" in text and "docs/config.md" in text


def test_help_lists_the_recipes_of_its_program_with_a_line_each(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "experiment").mkdir()
    (folder / "experiment" / "my_own.yaml").write_text("# @package _global_\n# My task.\nalgorithm: {gamma: 0.9}\n")
    listed = {}
    for program in (PPO, SFT):
        arguments = ["--help", "--config-dir=."]
        run_hydra(program.config_name, lambda *_: pytest.fail("it ran"), arguments, programs=(program,))
        lines = capsys.readouterr().out.partition("recipes:\n")[2].splitlines()
        listed[program.name] = dict(line.split(maxsplit=1) for line in lines)
    assert listed["main_sft"].keys() == {"quickstart_sft", "gsm8k_tiny_sft"}
    assert listed["main_ppo"].keys() > {"my_own", "quickstart", "gsm8k_tiny", "qwen2.5_7b_8"}
    assert listed["main_ppo"].keys() & listed["main_sft"].keys() == set()
    assert listed["main_ppo"]["my_own"] == "My task."


def test_every_recipe_says_of_itself_what_it_is_in_one_line() -> None:
    lines = recipes_of(PROGRAMS, None)
    assert len(lines) >= 7
    assert [name for name, line in lines.items() if not line.endswith(".") or len(name + line) > 116] == []


@pytest.mark.parametrize("base", ["ppo_trainer", "ppo_megatron_trainer", "sft_trainer"])
def test_the_folder_of_a_run_composes_to_the_same_run(base: str, folder: Path) -> None:
    overrides = ["trainer.seed=5", "trainer.experiment_name=again"]
    values = composed(*overrides, config_name=base)
    with run_folder(folder / "run", values, overrides) as run:
        pass
    assert yaml.safe_load((run / "overrides.yaml").read_text()) == overrides
    assert composed("--config-dir=run", "--config-name=config", config_name=base) == values
    assert composed("--config-dir=run", "--config-name=config", *overrides, config_name=base) == values


@pytest.mark.parametrize(
    "text", ["1e-6", "1_000", "on", "null", "", "${a.b}", "\\${a}", "x\\\\${a", "2024-01-01", "0o7", "a: b", "#", "\n"]
)
def test_a_string_composes_to_itself_whatever_it_looks_like(text: str, folder: Path) -> None:
    values = {"a": {"b": text, "c": [text, 1.5e-7, None]}}
    (folder / "mine.yaml").write_text(as_yaml(values))
    assert composed(*MINE) == values


def test_flags_of_a_command_are_taken_out_before_the_config_is_composed() -> None:
    parser = FlagParser()
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--gpus", type=int)
    flags, rest = take_flags(parser, ["data.a=1", "--gpus", "4", "--config-name=x", "--json", "+b.c=-1"])
    assert (flags.json, flags.gpus) == (True, 4)
    assert rest == ["data.a=1", "--config-name=x", "+b.c=-1"]
    with pytest.raises(ConfigError, match="--gpus: invalid int value: 'x'"):
        take_flags(parser, ["--gpus=x"])


def test_a_recipe_that_is_named_twice_counts_once() -> None:
    typed = ["--config-name=ppo_megatron_trainer", "experiment=quickstart", "+experiment=quickstart"]
    once, twice = (compose(parse_command_line(line, "ppo_trainer")).values() for line in (typed[:2], typed))
    for values in (once, twice):
        values["trainer"].pop("run_dir")
    assert twice == once and once["trainer"]["experiment_name"] == "quickstart"
