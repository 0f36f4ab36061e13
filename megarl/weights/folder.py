"""Where a model's files are on this machine."""

from __future__ import annotations

from pathlib import Path

from megarl.errors import ModelFolderError


def expanded(path: str | Path, key: str) -> Path:
    """Return the Path of a folder with its tilde expanded. key: what names it, for the error."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # ~someone, whom this machine doesn't know
        raise ModelFolderError(f"{key} = {str(path)!r}: {error} Write the folder out") from error


def resolve_model_folder(path: str, key: str = "model.path") -> str:
    """Return the local folder of a model: itself, or the snapshot in the Hugging Face cache that bears its name.

    key: what names it, for the error. Raises ModelFolderError where it is neither.
    """
    folder = expanded(path, key)
    if folder.is_dir():
        return str(folder.resolve())
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return str(snapshot_download(path, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError) as error:
        raise ModelFolderError(
            f"{key} = {path!r} is neither a folder nor a model in the local Hugging Face cache; "
            f"give a folder, or download it first: hf download {path}"
        ) from error
