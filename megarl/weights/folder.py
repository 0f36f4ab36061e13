"""Where a model's files are on this machine."""

from __future__ import annotations

from pathlib import Path

from megarl.errors import ModelFolderError


def resolve_model_folder(path: str) -> str:
    """Return the local folder of a model: itself, or the snapshot in the Hugging Face cache that bears its name.

    Raises ModelFolderError where it is neither.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return str(folder.resolve())
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return str(snapshot_download(path, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError) as error:
        raise ModelFolderError(
            f"model.path = {path!r} is neither a folder nor a model in the local Hugging Face cache; "
            f"give a folder, or download it first: hf download {path}"
        ) from error
