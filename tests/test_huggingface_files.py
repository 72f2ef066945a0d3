"""Files of `save_pretrained`: written as a pair, by the umask, through links, and with a tensor under two names."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from full_disk import full_disk

import effformer

pytest.importorskip("huggingface_hub")
from effformer.huggingface import EfficientFormer

Narrow = Callable[..., effformer.EfficientFormer]
FILES = ["README.md", "config.json", "model.safetensors"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_full_disk_leaves_the_old_pair(narrow: Narrow, tmp_path: Path) -> None:
    EfficientFormer.from_network(narrow(num_classes=3)).save_pretrained(tmp_path)
    before = contents(tmp_path)
    with full_disk(20_000), pytest.raises(OSError, match=f"^{tmp_path}/model.safetensors cannot be written: "):
        EfficientFormer.from_network(narrow(num_classes=4)).save_pretrained(tmp_path)
    assert contents(tmp_path) == before
    with full_disk(20), pytest.raises(OSError, match="cannot be written: "):
        EfficientFormer.from_network(narrow()).save_pretrained(tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())


def test_a_config_that_cannot_be_replaced_keeps_the_old_weights(narrow: Narrow, tmp_path: Path) -> None:
    EfficientFormer.from_network(narrow(num_classes=3)).save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(OSError, match=f"^{tmp_path}/config.json cannot be written: it is not a regular file$"):
        EfficientFormer.from_network(narrow(num_classes=4)).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_modes_and_links(narrow: Narrow, tmp_path: Path) -> None:
    """The library writes weights that their owner alone may read."""
    saved, linked = tmp_path / "saved", tmp_path / "linked"
    before = os.umask(0o027)
    try:
        EfficientFormer.from_network(narrow()).save_pretrained(saved)
    finally:
        os.umask(before)
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in saved.iterdir()} == dict.fromkeys(FILES, 0o640)
    linked.mkdir()
    (linked / "model.safetensors").symlink_to(saved / "model.safetensors")
    network = EfficientFormer.from_network(narrow(num_classes=4))
    network.save_pretrained(linked)
    assert (linked / "model.safetensors").is_symlink()
    assert (saved / "model.safetensors").read_bytes() == (linked / "model.safetensors").read_bytes()
    assert EfficientFormer.from_pretrained(linked).num_classes == 4


@torch.no_grad()
def test_a_tensor_under_two_names_is_read_under_both(narrow: Narrow, tmp_path: Path) -> None:
    network, x = EfficientFormer.from_network(narrow()), torch.randn(1, 3, 64, 64, dtype=torch.float64)
    network.head_dist = network.head
    network.save_pretrained(tmp_path)
    assert torch.equal(EfficientFormer.from_pretrained(tmp_path)(x), network(x))


def test_the_readme_of_a_user_is_kept(narrow: Narrow, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    EfficientFormer.from_network(narrow()).save_pretrained(tmp_path, model_card_kwargs={"repo_url": "none"})
    assert (tmp_path / "README.md").read_text() == "mine"
    assert sorted(contents(tmp_path)) == FILES


def test_numbers_of_numpy_are_saved(tmp_path: Path) -> None:
    depths = tuple(np.array([1, 1, 1, 2]))
    made = EfficientFormer.create(
        "efficientformer_l1", depths=depths, num_classes=np.int64(3), drop_rate=np.float32(0.25), mlp_ratio=np.int8(2)
    )
    made.reset_classifier(torch.tensor([1, 6]).max())  # type: ignore[arg-type]
    made.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["depths"], config["num_classes"], config["drop_rate"]) == ([1, 1, 1, 2], 6, 0.25)
    assert EfficientFormer.from_pretrained(tmp_path, drop_rate=np.float64(0.5)).head_drop.p == 0.5
