from __future__ import annotations

import json
import signal
import threading
import time
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from megarl.data.messages import Chat
from megarl.data.template import RENDER_LIMIT_S, ChatTemplate
from megarl.data.verbs import verbs_tokenizer
from megarl.errors import ConfigError, DataError
from tests.unit.chats import assistant, chat, chatml_tokenizer, tool_calls, user

TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return verbs_tokenizer()


def rendered(template: str, asked: Chat | None = None, **arguments: Any) -> str:
    """Return the prompt of a chat by a chat template."""
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = template
    return ChatTemplate(tokenizer, arguments).prompt(asked or chat(user("hello")))[0]


def test_a_prompt_ends_where_the_assistant_speaks(tokenizer: PreTrainedTokenizerBase) -> None:
    text, token_ids = ChatTemplate(tokenizer).prompt(chat(user("Tom has 8")))
    assert text == "<|user|> Tom has 8 <|assistant|>"
    assert tokenizer.convert_ids_to_tokens(list(token_ids)) == ["<|user|>", "Tom", "has", "8", "<|assistant|>"]


def test_a_prompt_that_ends_with_the_assistant_goes_on_behind_its_words(tokenizer: PreTrainedTokenizerBase) -> None:
    text, token_ids = ChatTemplate(tokenizer).prompt(chat(user("Tom has 8"), assistant("8 -")))
    assert text == "<|user|> Tom has 8 <|assistant|> 8 -"
    assert tokenizer.convert_ids_to_tokens(list(token_ids))[-2:] == ["8", "-"]


def test_a_prompt_that_ends_with_a_call_of_a_tool_is_refused() -> None:
    with pytest.raises(DataError, match="the last message calls a tool, and nobody answers it"):
        ChatTemplate(chatml_tokenizer()).prompt(chat(user("hello"), tool_calls(look_up={})))


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('roles must alternate') }}", r"refuses these messages \(user\): .*roles must alternate"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[3].content }}", "UndefinedError: list object has no element 3"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ 'a' * 10 ** 15 }}", "MemoryError"),
        ("{{ range(10 ** 9) }}", "OverflowError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("a\n{% if %}", "has a mistake in its line 2"),
    ],
)
def test_a_template_that_fails_says_how(template: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        rendered(template)


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def test_a_template_that_never_ends_is_stopped_and_leaves_no_timer() -> None:
    before, start = signal.getsignal(signal.SIGVTALRM), time.process_time()
    with pytest.raises(DataError, match=r"the chat template runs longer than 2 s: an endless loop\?"):
        rendered(ENDLESS)
    assert time.process_time() - start < 2 * RENDER_LIMIT_S
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0) and signal.getsignal(signal.SIGVTALRM) is before


def test_a_template_is_rendered_in_any_thread() -> None:
    texts: list[str] = []
    thread = threading.Thread(target=lambda: texts.append(rendered("{{ messages[0].content }}")))
    thread.start()
    thread.join()
    assert texts == ["hello"]


def test_a_message_of_a_role_that_the_template_does_not_know_is_missed(tokenizer: PreTrainedTokenizerBase) -> None:
    knows_two = "{% for m in messages %}{% if m.role in ('system', 'user') %}{{ m.content }};{% endif %}{% endfor %}"
    assert rendered(knows_two, chat({"role": "system", "content": "s"}, user("hello"))) == "s;hello;"
    for role in ("User", "human", "developer"):
        with pytest.raises(DataError, match=rf"leaves out message 1, .*: 'hello' of the role '{role}'"):
            rendered(knows_two, chat(user("first"), {"role": role, "content": "hello"}))


def test_a_message_is_missed_though_another_says_the_same() -> None:
    last_alone = "{{ messages[-1].content }}"
    assert rendered(last_alone) == "hello"
    with pytest.raises(DataError, match="leaves out message 1"):
        rendered(last_alone, chat(user("hello"), user("hello")))


def test_what_an_earlier_turn_of_the_assistant_thought_may_be_left_out() -> None:
    of_users = "{% for m in messages if m.role == 'user' %}{{ m.content }};{% endfor %}"
    assert rendered(of_users, chat(user("a"), assistant("b"), user("c"))) == "a;c;"


def test_a_message_may_change_its_spaces_or_stand_as_json() -> None:
    asked = chat(user(" two\n lines "), {"role": "tool", "content": 'a "b"\nc'})
    text = rendered("{{ messages[0].content | trim | replace('\n', ' ') }}{{ messages[1].content | tojson }}", asked)
    assert text == 'two  lines"a \\"b\\"\\nc"'


WITH_TOOLS = "{% for t in tools %}{{ t | tojson }}{% endfor %}{{ messages[0].content }}"


def test_tools_are_rendered() -> None:
    assert rendered(WITH_TOOLS, Chat((user("hello"),), (TOOL,))) == json.dumps(TOOL) + "hello"


def test_a_template_that_renders_no_tools_is_refused_where_there_are_some() -> None:
    with pytest.raises(DataError, match="leaves out the tool 'look_up'"):
        rendered("{{ messages[0].content }}", Chat((user("hello"),), (TOOL,)))


def test_a_call_that_the_template_leaves_out_is_missed() -> None:
    asked = chat(user("hello"), tool_calls(look_up={"q": "a"}), {"role": "tool", "content": "b"})
    assert "look_up" in ChatTemplate(chatml_tokenizer()).prompt(asked)[0]
    with pytest.raises(DataError, match=r"leaves out message 1, .*: 'look_up'"):
        rendered("{% for m in messages %}{{ m.content }}{% endfor %}", asked)


def test_arguments_reach_the_template_and_one_that_it_does_not_read_is_noted() -> None:
    thinks = "{{ messages[0].content }}{% if enable_thinking is false %}<think></think>{% endif %}"
    assert rendered(thinks) == "hello"
    assert rendered(thinks, enable_thinking=False) == "hello<think></think>"
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = thinks
    assert ChatTemplate(tokenizer, {"enable_thinking": False}).notes() == ()
    assert ChatTemplate(tokenizer, {"thinking": 1}).notes() == (
        "no effect in this run: data.apply_chat_template_kwargs.thinking: the model's chat template doesn't read it",
    )


@pytest.mark.parametrize("name", ["tools", "messages", "tokenize", "add_generation_prompt", "chat_template"])
def test_arguments_that_megarl_sets_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.apply_chat_template_kwargs\.{name} = 1: is what megarl sets itself"):
        rendered("", **{name: 1})


def test_half_of_a_surrogate_pair_is_named() -> None:
    with pytest.raises(DataError, match="half of a surrogate pair"):
        rendered("{{ messages[0].content }}", chat(user("a\ud800")))
