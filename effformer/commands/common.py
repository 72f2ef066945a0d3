"""What several commands need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..apps.info import devices
from ..checkpoints import config_file as saved
from ..checkpoints import hub
from ..checkpoints.load import load_checkpoint, read_state_dict, settings_for
from ..factory import create_model
from ..model.network import EfficientFormer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def torch_device(name: str) -> torch.device:
    known = devices()
    chosen = {"auto": "cuda:0" if "cuda:0" in known else "cpu", "cuda": "cuda:0"}.get(name, name)
    if chosen not in known:
        raise ValueError(f"--device: got {name!r}, allowed are auto, {', '.join(known)}")
    return torch.device(chosen)


def network_of(name: str | None, checkpoint: str, backend: str) -> tuple[EfficientFormer, str, dict[str, Any], str]:
    """(network, its name, the checkpoint's config.json, what its weights are: "none" if random)."""
    torch.manual_seed(0)
    fallback = name or "efficientformer_l1"
    if checkpoint == "none":
        return create_model(fallback, backend=backend), fallback, {}, "none"
    source = hub.PRETRAINED[fallback] if checkpoint in ("auto", "pretrained") else checkpoint
    try:
        if checkpoint == "auto":
            print(f"looking for {source} (--checkpoint none skips this) ...", flush=True)
        path = hub.locate(source)
    except (ImportError, OSError) as error:
        if checkpoint != "auto":
            raise
        print(f"no trained weights: {str(error).splitlines()[0]}")
        return create_model(fallback, backend=backend), fallback, {}, "none"
    try:
        hub_config = hub.read_config(source)
    except OSError:
        print("its config.json cannot be had: images are prepared as for the published weights")
        hub_config = {}
    _, state = read_state_dict(path)
    if saved.is_saved(hub_config):  # it says all, and the weights' keys and shapes only some
        network = saved.rebuild(hub_config, str(source), EfficientFormer, backend=backend)
        found = saved.name_of(network.config)
    else:
        found, settings = settings_for(state)
        network = create_model(found, backend=backend, **settings)
    if name not in (None, found):
        raise ValueError(f"--model: got {name}, allowed is {found} with this checkpoint")
    report = load_checkpoint(network, state)
    print(f"loaded:   {path} ({report.format})")
    for what in ("ignored", "reinitialised", "cast"):
        if entries := getattr(report, what):
            print(f"  {what}: {', '.join(entries)}")
    return network, found, hub_config, source


def read_lines(option: str, path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{option}: {path} is not UTF-8 text ({error})") from error
