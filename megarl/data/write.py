"""Files of a prepared data set. A reader never sees one half-written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


def write_parquet(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as parquet, making the folder if needed. An existing file is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(list(rows))
    # In the same folder, since a rename is atomic only within one file system.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
        pq.write_table(table, Path(scratch) / path.name)
        os.replace(Path(scratch) / path.name, path)


def write_fresh_model(folder: Path, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Write a Hugging Face folder that has a tokenizer and a config.json but no weights: they are drawn at random."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing.") as scratch:
        tokenizer.save_pretrained(scratch)
        config.save_pretrained(scratch)
        for file in Path(scratch).iterdir():
            os.replace(file, folder / file.name)
