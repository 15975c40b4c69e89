"""Models of the Hugging Face hub: fetched by its own library, with what went wrong said in one line.

The library shows the progress of a download. When the connection breaks it asks for the rest of a file, five times.
When a download was cut off, the files that are whole are kept, and the others are fetched when it is run again.
`HF_HUB_OFFLINE=1` takes models from its cache alone, `HF_HOME` moves the cache, and `HF_ENDPOINT` names a mirror.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

from wpjax.checkpoints.folder import ADAPTER, MARKER, read_json
from wpjax.errors import CheckpointError

_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
_REPEATS = ["*/*", "consolidated*"]  # the same weights once more, in another layout


def download(hub_id: str) -> Path:
    """The folder of a hub model, fetched or found in the cache. Of weights only safetensors are fetched.

    Args:
        hub_id: "gpt2", "org/name" or "org/name@revision".

    Raises:
        CheckpointError: the hub does not give it, or only a part of it is in the cache. The message says why, and how
            to mend it.
    """
    from huggingface_hub import snapshot_download

    name, _, revision = hub_id.partition("@")
    try:
        folder = Path(
            snapshot_download(name, revision=revision or None, allow_patterns=_FILES, ignore_patterns=_REPEATS)
        )
    except Exception as error:  # the library's own, those of its HTTP client, those of the disk
        raise CheckpointError(f"{hub_id}: no such folder here, and {_why(name, revision, error)}") from error
    missing = _missing(folder)
    if missing:
        raise CheckpointError(
            f"{hub_id}: {missing} is not among its files in the cache ({folder}); if the download was cut off, run the "
            "same command with a network, and it goes on; a model is config.json and safetensors"
        )
    return folder


def _missing(folder: Path) -> str:
    """The first file that a model needs and a folder lacks; empty if it has all."""
    if (folder / ADAPTER).exists():
        return "" if list(folder.glob("adapter_model*")) else "adapter_model.safetensors"
    if not (folder / MARKER).exists():
        return MARKER
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return "" if list(folder.glob("*.safetensors")) else "model.safetensors"
    files = read_json(index).get("weight_map")
    names = sorted({str(file) for file in files.values()}) if isinstance(files, dict) else []
    return next((file for file in names if not (folder / file).exists()), "")


def _why(name: str, revision: str, error: Exception) -> str:
    """Why the hub gave nothing, in words, and how to mend it."""
    from huggingface_hub import constants, errors, get_token

    causes, page = list(_causes(error)), f"{constants.ENDPOINT}/{name}"
    reason = " ".join(str(error).split())[:200] or type(error).__name__

    def is_any(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    def has_code(code: int) -> bool:
        return any(isinstance(cause, OSError) and cause.errno == code for cause in causes)

    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    if is_any(errors.GatedRepoError):
        if get_token() is None:
            return f"the hub asks who wants it, as it is gated: accept its terms at {page}, then {log_in}"
        return f"the hub does not give it to the owner of this token, as it is gated: ask for access at {page}"
    if is_any(errors.RevisionNotFoundError):
        return f"the hub has no revision {revision!r} of it; {page}/refs lists branches and tags"
    if is_any(errors.RepositoryNotFoundError):
        private = f"if it is private or gated, {log_in}" if get_token() is None else "if it is private, ask for access"
        return f"the hub knows no such model; check the name; {private}"
    if constants.HF_HUB_OFFLINE:
        part = "only a part of it" if (hub := _cached(name)) and any(hub.glob("snapshots/*/*")) else "it is not"
        return (
            f"{part} in the cache ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE is set; unset it, or fetch the model "
            f"where there is a network: hf download {name}"
        )
    if has_code(errno.ENOSPC):
        return f"the disk of the cache ({constants.HF_HUB_CACHE}) is full; make room, or set HF_HOME to another place"
    if is_any(PermissionError):
        return f"the cache cannot be written to ({reason}); set HF_HOME to a folder of yours"
    if is_any(errors.HfHubHTTPError):
        return f"the hub did not give it ({reason}); try again later"
    if is_any(errors.HFValidationError):
        return f"it is no name of the hub's ({reason}); correct it"
    return (
        f"the hub at {constants.ENDPOINT} cannot be reached ({_root(causes)}); check the network and its proxy, and "
        "run the same command again: files that are whole are kept; without a network, name a folder"
    )


def _cached(name: str) -> Path | None:
    """The folder of a model in the cache, if there is one."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    return folder if folder.is_dir() else None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and what it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _root(causes: list[BaseException]) -> str:
    """What was wrong at the bottom, in words."""
    said = [" ".join(str(cause).split()) for cause in causes]
    return next((text for text in reversed(said) if text), type(causes[-1]).__name__)[:200]
