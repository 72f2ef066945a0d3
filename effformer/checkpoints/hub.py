"""Where a checkpoint comes from: a local file or folder, or the Hugging Face hub (extra `hub`)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from .download import HubError, download

# timm's conversions of the original ImageNet-1k weights.
PRETRAINED = {f"efficientformer_{size}": f"timm/efficientformer_{size}.snap_dist_in1k" for size in ("l1", "l3", "l7")}
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
INDICES = tuple(f"{name}.index.json" for name in WEIGHT_FILES)  # of weights in several files, in a local folder

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".tar", ".ckpt")
_HUB_ID = re.compile(r"(?:hf[-_]hub:)?(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


def locate(checkpoint: str | Path, **keywords: Any) -> Path:
    """The weight file of a checkpoint, downloaded if need be.

    Args:
        checkpoint: a weight file; a folder with one of `WEIGHT_FILES` or `INDICES`; or a hub id "owner/name" or
            "owner/name@revision", with or without timm's "hf-hub:" before it. Existing paths come first.
        **keywords: of `hf_hub_download`, such as revision, token or cache_dir.

    Raises:
        FileNotFoundError: for a path that does not exist, a folder or repository without weights.
        ImportError: for a hub id without huggingface_hub.
        HubError: (a ConnectionError) where the hub cannot be reached or refuses, and the cache has no such file.
        ValueError: for a name that the hub would not allow.
    """
    if Path(checkpoint).is_file():
        return Path(checkpoint)
    failure = None
    for name in WEIGHT_FILES:
        try:
            if (path := _fetch(checkpoint, name, keywords)) is not None:
                return path
        except HubError as error:  # the cache may hold the other one
            failure, keywords = failure or error, keywords | {"local_files_only": True}
    if failure is not None:
        raise failure
    if Path(checkpoint).is_dir():
        for name in INDICES:
            if (Path(checkpoint) / name).is_file():
                return Path(checkpoint) / name
        raise FileNotFoundError(f"checkpoint: {checkpoint} {_why_no_weights(Path(checkpoint))}")
    raise FileNotFoundError(f"checkpoint: {checkpoint} has none of {', '.join(WEIGHT_FILES)}")


def read_config(checkpoint: str | Path, **keywords: Any) -> dict[str, Any]:
    """The `config.json` of a checkpoint's folder or repository, timm's or `config_file`'s; {} without one.

    Of a file named as in `WEIGHT_FILES` or `INDICES`, its folder is looked at. `keywords` are as for `locate`.

    Raises:
        ValueError: where it is not a JSON object.
        FileNotFoundError, ImportError, OSError: as `locate`.
    """
    if Path(checkpoint).is_file():
        checkpoint = Path(checkpoint)
        if checkpoint.name not in (*WEIGHT_FILES, *INDICES):
            return {}
        checkpoint = checkpoint.absolute().parent
    if (path := _fetch(checkpoint, "config.json", keywords)) is None:
        return {}
    try:
        content = json.loads(path.read_bytes())  # UTF-8 or UTF-16, also with a byte order mark
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: got {type(content).__name__}, allowed is a JSON object")
    return content


def read_config_if_there(checkpoint: str | Path) -> dict[str, Any]:
    """As `read_config`, but {} where it cannot be had: offline, the cache may hold the weights alone."""
    try:
        return read_config(checkpoint)
    except OSError:
        return {}


def _why_no_weights(folder: Path) -> str:
    """The reason why a folder has no weights to load, and the way out."""
    names = sorted(path.name for path in folder.iterdir())
    if ".metadata" in names:
        how = "torch.distributed.checkpoint.format_utils.dcp_to_torch_save makes one file of it"
        return f"is a checkpoint of torch.distributed.checkpoint: {how}"
    lacks = f"has none of {', '.join((*WEIGHT_FILES, *INDICES))}"
    found = [name for name in names if name.endswith(_WEIGHT_SUFFIXES)]
    return f"{lacks}: name one of its files, such as {found[0]}" if found else lacks


def _fetch(checkpoint: str | Path, name: str, keywords: dict[str, Any]) -> Path | None:
    """File `name` of a folder or hub repository, None where that has no such file."""
    folder = Path(checkpoint)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    match = _HUB_ID.fullmatch(str(checkpoint))
    if match is None or folder.suffix in _WEIGHT_SUFFIXES:
        raise FileNotFoundError(f"checkpoint: {checkpoint} is not a file, a folder or a hub id (owner/name)")
    return download(match["repo"], name, **{"revision": match["revision"], **keywords})
