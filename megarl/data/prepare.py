"""Write a data set as the parquet files that a run reads: ``python -m megarl.data.prepare <name> --out DIR``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megarl.config.command_line import end_quietly_with_the_reader
from megarl.data.gsm8k import prepare_gsm8k
from megarl.data.smollm2 import prepare_smollm2
from megarl.data.verbs import prepare_verbs
from megarl.errors import MegarlError


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare the data set that the command line names. Return the exit status."""
    options = _parser().parse_args(arguments)
    try:
        written = _prepare(options)
    except (MegarlError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for path, size in written.items():
        print(f"wrote {path}: {size}")
    return 0


def _prepare(options: argparse.Namespace) -> dict[Path, str]:
    out = options.out.expanduser()
    if options.name == "verbs":
        return prepare_verbs(out, options.seed)
    if options.name == "smollm2":
        return prepare_smollm2(out)
    return prepare_gsm8k(options.source.expanduser(), out, tiny_model=options.tiny_model)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m megarl.data.prepare", description="Write a data set as parquet.")
    names = parser.add_subparsers(dest="name", required=True)
    gsm8k = names.add_parser("gsm8k", help="grade-school word problems, from a copy you have downloaded")
    gsm8k.add_argument(
        "--source",
        type=Path,
        required=True,
        help="train.jsonl or test.jsonl, or a folder with them, or a downloaded copy of openai/gsm8k (parquet)",
    )
    gsm8k.add_argument(
        "--tiny-model", action="store_true", help="also write model/: a tokenizer and the config of a small fresh Qwen3"
    )
    verbs = names.add_parser("verbs", help="the quickstart task, generated, with its tokenizer and model config")
    verbs.add_argument("--seed", type=int, default=0, help="of the demonstrations and of the training prompts")
    smollm2 = names.add_parser("smollm2", help="a pretrained model of 135M parameters, and numbers to count on from")
    for name in (gsm8k, verbs, smollm2):
        name.add_argument("--out", type=Path, required=True, help="folder to write into")
    return parser


if __name__ == "__main__":
    end_quietly_with_the_reader()
    sys.exit(main())
