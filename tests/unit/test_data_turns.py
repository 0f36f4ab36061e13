from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase

from megarl.data.messages import Chat, Message
from megarl.data.template import ChatTemplate
from megarl.data.turns import Masking, encode_example, end_of_turn
from megarl.data.verbs import verbs_tokenizer
from megarl.errors import DataError
from tests.unit.chats import CHATML, assistant, chat, chatml_tokenizer, tool_calls, user

LAST, RENDERING = Masking("last"), Masking(start="rendering")
# Turns before the last lose their thoughts, and the last has some, if empty ones: as Qwen3.
THINKS_LAST = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The prompt opens thoughts that the rendered turn lacks: as DeepSeek-R1.
OPENS_THOUGHTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
# The text ends with a token of its own where nobody is about to speak: as Phi-3.
ENDS_TWICE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}<|endoftext|>{% endif %}"
)


def trained(tokenizer: PreTrainedTokenizerBase, masking: Masking, *messages: Message) -> list[str]:
    """Return the texts that are trained, turn by turn."""
    token_ids, mask = encode_example(ChatTemplate(tokenizer), Chat(messages), masking)
    assert len(token_ids) == len(mask)
    turns: list[list[int]] = []
    for place, token in enumerate(token_ids):
        if mask[place]:
            turns = turns if place and mask[place - 1] else [*turns, []]
            turns[-1].append(token)
    return [tokenizer.decode(turn) for turn in turns]


def by(template: str, masking: Masking, *messages: Message) -> list[str]:
    return trained(chatml_tokenizer(template=template), masking, *messages)


def test_only_the_responses_and_their_ends_are_trained() -> None:
    talk = (user("Tom has 8"), assistant("5"), user("Ana"), assistant("9"), user("Sam"))
    assert trained(verbs_tokenizer(), Masking(), *talk) == ["5 <|end|>", "9 <|end|>"]
    assert by(CHATML, Masking(), *talk) == ["5<|im_end|>", "9<|im_end|>"]


def test_what_is_trained_begins_where_a_rollout_would() -> None:
    template, messages = ChatTemplate(verbs_tokenizer()), (user("Tom has 8"), assistant("5"))
    token_ids, mask = encode_example(template, Chat(messages), Masking())
    assert token_ids[: mask.index(True)] == template.prompt(chat(messages[0]))[1]


def test_a_turn_that_only_calls_a_tool_is_trained() -> None:
    answer = {"role": "tool", "content": "b"}
    assert by(CHATML, Masking(), user("a"), tool_calls(look_up={"q": "a"}), answer, assistant("b")) == [
        '<tool_call>{"name": "look_up", "arguments": {"q": "a"}}</tool_call><|im_end|>',
        "b<|im_end|>",
    ]


def test_what_a_template_writes_after_the_end_of_a_turn_is_not_trained() -> None:
    template = CHATML.replace("<|im_end|>\n", "<|im_end|>and\n")
    assert by(template, Masking(), user("Tom"), assistant("8")) == ["8<|im_end|>"]


def test_the_last_turn_or_every_rendering_is_trained_where_earlier_ones_lose_their_thoughts() -> None:
    talk = (user("Tom"), assistant("8"), user("Ana"), assistant("9"))
    with pytest.raises(DataError) as caught:
        by(THINKS_LAST, Masking(), *talk)
    for part in (
        "renders message 1 otherwise once others follow",
        r"alone 'ant\n<think>\n\n</t'",  # both texts, with a little of what comes before
        r"in the conversation 'ant\n8<|im_end|>",
        "fix: data.trained_turns=last trains the last turn alone or data.response_start=rendering trains every turn",
    ):
        assert part in str(caught.value)
    assert by(THINKS_LAST, LAST, *talk) == ["<think>\n\n</think>\n\n9<|im_end|>"]
    assert by(THINKS_LAST, RENDERING, *talk) == ["8<|im_end|>", "<think>\n\n</think>\n\n9<|im_end|>"]


def test_a_turn_that_no_choice_can_train_is_told_what_else_to_do() -> None:
    rewrites = CHATML.replace("{{ m.content }}", "{{ m.content if loop.last else m.content | upper }}")
    with pytest.raises(DataError, match="leaves out message 1"):
        by(rewrites, Masking(), user("TOM"), assistant("eight"), user("Ana"))
    counts = "{{ messages | length }}" + CHATML
    with pytest.raises(DataError, match="fix: end the conversation with the assistant's message, or use a template"):
        by(counts, Masking(), user("Tom"), assistant("8"))


def test_a_rendering_is_trained_where_the_prompt_opens_thoughts_that_it_lacks() -> None:
    talk = (user("Tom"), assistant("8"))
    with pytest.raises(DataError) as caught:
        by(OPENS_THOUGHTS, Masking(), *talk)
    for part in (
        "the prompt that a rollout would see before message 1 is not the beginning of the rendered conversation",
        r"the prompt 'ant\n<think>\n'",
        r"the conversation 'ant\n8<|im_end|>'",
        "fix: data.response_start=rendering trains every turn as the template renders it",
    ):
        assert part in str(caught.value)
    assert by(OPENS_THOUGHTS, RENDERING, *talk) == ["8<|im_end|>"]
    assert by(OPENS_THOUGHTS, RENDERING, *talk, user("Ana"), assistant("9")) == ["8<|im_end|>", "9<|im_end|>"]


def test_thoughts_that_a_template_drops_from_what_is_trained_are_missed() -> None:
    with pytest.raises(DataError, match="leaves out message 1, or a part of it: 'why</think>8'"):
        by(OPENS_THOUGHTS, RENDERING, user("Tom"), assistant("why</think>8"))


def test_a_rendering_that_rewrites_what_comes_before_a_turn_is_refused() -> None:
    counts = "{{ messages | length }}" + CHATML
    for masking in (Masking(), RENDERING):
        with pytest.raises(DataError, match="is not the beginning of the rendered conversation"):
            by(counts, masking, user("Tom"), assistant("8"))


def test_a_response_that_grows_together_with_its_prompt_is_named() -> None:
    with pytest.raises(DataError, match=r"are one token, which no rollout would see\. fix: take the spaces"):
        by(CHATML, Masking(), user("Tom"), assistant("\n\n8"))
    assert by(CHATML, Masking(), user("Tom"), assistant("8\n\n9\n")) == ["8\n\n9\n<|im_end|>"]


@pytest.mark.parametrize(
    ("stops", "ends"),
    [
        (("<|end|>", "<|endoftext|>"), ["8<|end|>", "9<|end|>"]),
        (("<|endoftext|>",), ["8<|end|>", "9<|end|>\n<|endoftext|>"]),
        ((), ["8<|end|>", "9<|end|>\n<|endoftext|>"]),
    ],
)
def test_a_turn_ends_with_the_first_token_that_stops_a_response(stops: tuple[str, ...], ends: list[str]) -> None:
    tokenizer = chatml_tokenizer("<|endoftext|>", ENDS_TWICE)
    masking = Masking(stops=tuple(tokenizer.convert_tokens_to_ids(list(stops))))
    assert trained(tokenizer, masking, user("Tom"), assistant("8"), user("Ana"), assistant("9")) == ends


def test_the_end_of_a_turn_is_a_token_of_the_template_whatever_the_tokenizer_s_eos() -> None:
    tokenizer = chatml_tokenizer(eos="<|endoftext|>")
    eos, im_end = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert end_of_turn(ChatTemplate(tokenizer), (eos,)) == im_end
    assert end_of_turn(ChatTemplate(verbs_tokenizer()), (4,)) == 4  # <|end|>, though the words of the probe are unknown


def test_a_template_that_never_ends_a_response_is_refused() -> None:
    with pytest.raises(DataError, match="never learn to stop"):
        by(CHATML.replace("<|im_end|>", "").replace("<|im_start|>", "#"), Masking(), user("Tom"), assistant("8"))


def test_a_conversation_without_a_turn_to_train_is_refused() -> None:
    with pytest.raises(DataError, match=r"nothing to train on\. roles: user, user"):
        by(CHATML, Masking(), user("Tom"), user("Ana"))
    with pytest.raises(DataError, match="message 0 is the assistant's: no prompt comes before it"):
        by(CHATML, Masking(), assistant("8"), user("Ana"))
