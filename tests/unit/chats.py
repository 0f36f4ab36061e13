"""Chats and tokenizers that tests of templates share."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megarl.data.messages import Chat, Message

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|end|>")


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def tool_calls(**calls: Any) -> Message:
    """Return a turn of the assistant that says nothing and calls tools by name, each with its arguments."""
    functions = [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in calls.items()]
    return {"role": "assistant", "tool_calls": functions}


def chat(*messages: Message) -> Chat:
    return Chat(messages)


def chatml_tokenizer(eos: str = "<|im_end|>", template: str = CHATML) -> PreTrainedTokenizerBase:
    """Return a tokenizer of single bytes, two line breaks as one token, and the special tokens of several models."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    break_ = "\u010a"  # how byte-level tokenizers write a line break
    words = [*_SPECIAL, *alphabet, break_ * 2]
    bpe = models.BPE({word: i for i, word in enumerate(words)}, [(break_, break_)])
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in _SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, eos_token=eos)
