from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from megarl.checks.run import check_ppo, check_sft
from megarl.controller.inputs import PPOInputs, SFTInputs, notes_on, read_ppo_inputs, read_sft_inputs
from megarl.data.mixing import MixedOrder
from megarl.data.order import Order
from megarl.data.tiny_qwen3 import tiny_qwen3
from megarl.data.write import write_fresh_model, write_parquet
from tests.unit.chats import CHATML, assistant, chatml_tokenizer, user
from tests.unit.composed_configs import composed_values

ROLLOUT = "actor_rollout_ref.rollout"
ENDOFTEXT, IM_END = 0, 2


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., PreTrainedTokenizerBase]:
    """Return what writes model/ and the data of both kinds of run into the working directory."""
    monkeypatch.chdir(tmp_path)

    def write(eos: str, template: str = CHATML, **generation: object) -> PreTrainedTokenizerBase:
        tokenizer = chatml_tokenizer(eos, template)
        write_fresh_model(tmp_path / "model", tokenizer, tiny_qwen3(tokenizer, max_position_embeddings=128))
        if generation:
            (tmp_path / "model" / "generation_config.json").write_text(json.dumps(generation))
        asked = {"prompt": "Tom", "data_source": "d", "reward_model": {"ground_truth": "8"}}
        write_parquet(tmp_path / "rl.parquet", [asked] * 3 + [{**asked, "prompt": "Tom " * 20}])
        write_parquet(tmp_path / "sft.parquet", [{"messages": [user("Tom"), assistant("8")]}] * 4)
        (tmp_path / "reward.py").write_text("def compute_score(**rollout): return 0.0")
        return tokenizer

    return write


def ppo_inputs(**changes: object) -> PPOInputs:
    base: dict[str, object] = {
        "actor_rollout_ref.model.path": "model",
        "actor_rollout_ref.model.init": "random",
        "actor_rollout_ref.model.dtype": "float32",
        "data.train_files": ["rl.parquet"],
        "data.val_files": ["rl.parquet"],
        "data.train_batch_size": 2,
        "data.max_prompt_length": 60,
        "data.max_response_length": 6,
        "actor_rollout_ref.actor.ppo_mini_batch_size": 8,
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": 8,
        "actor_rollout_ref.actor.lr_scheduler.warmup_steps": 0,
        "algorithm.adv_estimator": "grpo",
        f"{ROLLOUT}.n": 4,
        "reward.path": "reward.py",
        "trainer.n_gpus_per_node": 1,
        "trainer.total_training_steps": 3,
    }
    return read_ppo_inputs(check_ppo(composed_values("ppo_megatron_trainer", **(base | changes))))


def sft_inputs(**changes: object) -> SFTInputs:
    base: dict[str, object] = {
        "model.path": "model",
        "model.init": "random",
        "data.train_files": ["sft.parquet"],
        "data.train_batch_size": 4,
        "data.max_length": 128,
        "lr_scheduler.warmup_steps": 0,
        "trainer.n_gpus_per_node": 1,
        "trainer.total_training_steps": 1,
    }
    return read_sft_inputs(check_sft(composed_values("sft_trainer", **(base | changes))))


LEFT_OUT = "left out as longer than data.max_prompt_length: 2 prompts"


def test_a_response_stops_where_the_template_ends_a_turn_and_the_run_says_so(
    written: Callable[..., PreTrainedTokenizerBase],
) -> None:
    written(eos="<|endoftext|>")
    inputs = ppo_inputs()
    assert inputs.stop_token_ids == (ENDOFTEXT, IM_END)
    assert inputs.notes == (
        LEFT_OUT,
        "a response ends at '<|im_end|>' (2) too, with which the chat template ends a turn: the model's folder has "
        "only '<|endoftext|>' (0)",
    )


def test_nothing_is_said_where_folder_or_user_name_the_end_of_a_turn(
    written: Callable[..., PreTrainedTokenizerBase],
) -> None:
    written(eos="<|endoftext|>", eos_token_id=[ENDOFTEXT, IM_END])
    assert (ppo_inputs().stop_token_ids, ppo_inputs().notes) == ((ENDOFTEXT, IM_END), (LEFT_OUT,))
    assert sft_inputs().notes == ()
    written(eos="<|endoftext|>", eos_token_id=ENDOFTEXT)
    assert ppo_inputs(**{f"{ROLLOUT}.stop_token_ids": [IM_END]}).notes == (LEFT_OUT,)


def test_a_run_that_ignores_ends_stops_at_the_user_s_own_alone(
    written: Callable[..., PreTrainedTokenizerBase],
) -> None:
    written(eos="<|im_end|>")
    assert ppo_inputs(**{f"{ROLLOUT}.ignore_eos": True, f"{ROLLOUT}.stop_token_ids": [3]}).stop_token_ids == (3,)


def test_a_template_without_an_end_of_turns_is_told(written: Callable[..., PreTrainedTokenizerBase]) -> None:
    written("<|im_end|>", "{% for m in messages %}{{ m.content }}{% endfor %}")
    inputs = ppo_inputs()
    assert inputs.stop_token_ids == (IM_END,)
    assert inputs.notes[1].startswith("a response ends at '<|im_end|>' (2): what ends a turn is unknown, for the chat")


def test_sft_says_when_turns_are_trained_to_end_with_what_stops_no_engine(
    written: Callable[..., PreTrainedTokenizerBase],
) -> None:
    written(eos="<|endoftext|>")
    [note] = sft_inputs().notes
    assert note.startswith("turns are trained to end with '<|im_end|>' (2), which is no stop token of ")
    assert "for other engines add it to eos_token_id in generation_config.json" in note
    written(eos="<|im_end|>")
    assert sft_inputs().notes == ()


def test_a_run_says_once_that_fsdp_is_sharded_as_fsdp2(written: Callable[..., PreTrainedTokenizerBase]) -> None:
    written(eos="<|im_end|>")
    [note] = sft_inputs(strategy="fsdp").notes
    assert note.startswith("strategy = fsdp: sharded by fully_shard, as fsdp2 is;")
    assert sft_inputs(strategy="fsdp2").notes == ()


def test_prompts_can_be_cut_instead_and_arguments_reach_the_template(
    written: Callable[..., PreTrainedTokenizerBase],
) -> None:
    thinks = CHATML + "{% if add_generation_prompt and not enable_thinking %}<think></think>{% endif %}"
    written("<|im_end|>", thinks)
    arguments = {"enable_thinking": False, "other": 1}
    inputs = ppo_inputs(**{"data.overlong_prompts": "left", "data.apply_chat_template_kwargs": arguments})
    assert [len(prompt.token_ids) for prompt in inputs.train_prompts][-1] == 60
    assert all(prompt.text.endswith("<|im_start|>assistant\n<think></think>") for prompt in inputs.train_prompts)
    assert inputs.notes == (
        "cut (left) as longer than data.max_prompt_length: 2 prompts",
        "no effect in this run: data.apply_chat_template_kwargs.other: the model's chat template doesn't read it",
    )


def test_what_is_trained_of_a_conversation_is_the_user_s_choice(
    written: Callable[..., PreTrainedTokenizerBase],
) -> None:
    tokenizer = written("<|im_end|>", CHATML + "{% if add_generation_prompt %}<think>\n{% endif %}")
    talk = [user("Tom"), assistant("8"), user("Ana"), assistant("9")]
    write_parquet(Path("sft.parquet"), [{"messages": talk}] * 4)
    chosen = {"data.response_start": "rendering", "data.trained_turns": "last"}
    example = sft_inputs(**chosen).examples[0]
    trained = [token for token, is_trained in zip(example.token_ids, example.loss_mask, strict=True) if is_trained]
    assert tokenizer.decode(trained) == "9<|im_end|>"


def test_a_file_that_is_smaller_than_its_share_of_a_step_is_told_of() -> None:
    [note] = notes_on(MixedOrder((50, 7000), (1.0, 2.0), 256, True, 0), 0, "filter")
    assert note == (
        "data.train_file_weights: file 1 of data.train_files has 50 rows and gives 85.33 to a step: "
        "rows of it may come more than once in a step"
    )
    assert notes_on(MixedOrder((500, 7000), (1.0, 1.0), 256, True, 0), 0, "filter") == ()


def test_prompts_that_were_left_out_or_cut_are_told_of() -> None:
    order = Order(8, 4, True, 0)
    assert notes_on(order, 3, "filter") == ("left out as longer than data.max_prompt_length: 3 prompts",)
    assert notes_on(order, 3, "left") == ("cut (left) as longer than data.max_prompt_length: 3 prompts",)
