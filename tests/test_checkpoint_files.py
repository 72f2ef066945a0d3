"""Checkpoint files of every kind: records beside the weights, objects that could run code, files that are none."""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import functools
import gzip
import io
import json
import logging
import pathlib
import pickle
import re
import tarfile
import types
import uuid
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from l1_networks import assert_loaded
from small_networks import small
from torch import Tensor, nn

from effformer import load_checkpoint
from effformer.checkpoints.formats import CheckpointError
from effformer.checkpoints.read import read_file


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return small(seed=1).state_dict()


RECORDS: dict[str, Any] = {
    "numpy numbers": {"best": np.float64(81.2), "step": np.int64(3), "ok": np.bool_(True), "when": np.datetime64("now")},
    "numpy arrays": {"curve": np.arange(5.0), "names": np.array(["a", "b"], dtype=object), "mask": np.ones((2, 3), bool)},
    "random states": {"numpy": np.random.RandomState(0).get_state(), "generator": np.random.default_rng(0), "torch": torch.get_rng_state()},
    "paths": [pathlib.PurePosixPath("/data"), pathlib.PureWindowsPath("c:/data"), Path("x")],
    "times": [datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC), datetime.date(2026, 1, 2), datetime.timedelta(1)],
    "collections": {
        "log": collections.defaultdict(list, {"loss": [1.0]}), "last": collections.deque([1, 2], maxlen=5),
        "count": collections.Counter("aab"), "nested": collections.defaultdict(dict, {1: {"a": 2}}),
    },
    "settings": [argparse.Namespace(lr=0.1, opt=argparse.Namespace(name="adam")), types.SimpleNamespace(a=1)],
    "loggers": logging.getLogger("trainer"),
    "others": [decimal.Decimal("0.1"), uuid.UUID(int=1), {1, 2}, frozenset({3}), range(4), slice(1, 2), 1j, b"bytes"],
    "torch": [torch.device("cpu"), torch.float16, torch.Size([1, 2]), torch.__version__, torch.Generator()],
    "training": [torch.optim.AdamW, functools.partial(torch.optim.SGD, lr=1), re.compile("a")],
}  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", RECORDS)
def test_records_beside_the_weights(tmp_path: Path, state: dict[str, Tensor], kind: str, zipped: bool) -> None:
    path = tmp_path / "last.ckpt"
    content = {"before": RECORDS[kind], "model": state, "after": RECORDS[kind]}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    network = small()
    assert load_checkpoint(network, path).container == "model"
    assert_loaded(network, state)


class Config:
    """A class of the trainer's own, as scripts pickle them."""

    def __init__(self) -> None:
        self.lr = 0.1


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_objects_are_named(tmp_path: Path, state: dict[str, Tensor], zipped: bool) -> None:
    path = tmp_path / "last.pth"
    torch.save({"state_dict": state, "config": Config()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(small(), path)
    text = str(error.value)
    assert "test_checkpoint_files.Config" in text
    assert "load_checkpoint(model, torch.load(path, weights_only=False))" in text
    assert "\n" not in text
    load_checkpoint(small(), torch.load(path, weights_only=False))  # as the error says


def test_a_pickled_module_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(nn.Sequential(nn.Linear(2, 2)), path)
    with pytest.raises(CheckpointError, match=r"pickled objects \(torch.nn.modules.container.Sequential"):
        load_checkpoint(small(), path)


def test_the_suffix_does_not_matter(tmp_path: Path, state: dict[str, Tensor]) -> None:
    safetensors.torch.save_file(state, tmp_path / "weights.pth")
    torch.save(state, tmp_path / "weights.safetensors")
    torch.save(state, tmp_path / "weights")
    for name in ("weights.pth", "weights.safetensors", "weights"):
        network = small()
        load_checkpoint(network, tmp_path / name)
        assert_loaded(network, state)


def test_a_tensor_of_two_names_in_safetensors(tmp_path: Path) -> None:
    one = small(seed=4)
    one.head_dist = one.head
    safetensors.torch.save_model(one, str(tmp_path / "model.safetensors"))
    two = small()
    load_checkpoint(two, tmp_path / "model.safetensors")
    assert torch.equal(two.head.weight, one.head.weight)
    assert torch.equal(two.head_dist.weight, one.head.weight)


def test_threads_read_side_by_side(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = tmp_path / "last.pth"
    torch.save(
        {"model": {"stem.conv1.weight": torch.zeros(1)}, "best": np.float64(1), "args": RECORDS["settings"]}, path
    )
    with ThreadPoolExecutor(4) as pool:
        assert all("model" in found for found in pool.map(read_file, [path] * 40))


def test_what_the_caller_allows_is_not_called(tmp_path: Path, state: dict[str, Tensor]) -> None:
    """torch looks names up in a set, so that of each name either object may be found: ten leave no luck."""
    names = [
        *("datetime.datetime", "datetime.date", "datetime.timedelta", "decimal.Decimal", "uuid.UUID"),
        *(
            "argparse.Namespace",
            "types.SimpleNamespace",
            "collections.deque",
            "pathlib.PurePosixPath",
            "builtins.slice",
        ),
    ]
    path = tmp_path / "last.pth"
    torch.save({"model": state, "records": [RECORDS[kind] for kind in ("times", "settings", "others", "paths")]}, path)
    with torch.serialization.safe_globals([(refuse, name) for name in names]):  # type: ignore[list-item]
        load_checkpoint(small(), path)
        assert (refuse, names[0]) in torch.serialization.get_safe_globals()


def refuse(*_: Any) -> None:
    raise AssertionError("an object of the caller's was called")


def test_weights_in_several_files(tmp_path: Path, state: dict[str, Tensor]) -> None:
    names = sorted(state)
    parts = {"model-1.safetensors": names[:20], "model-2.safetensors": names[20:]}
    for file, keys in parts.items():
        safetensors.torch.save_file({key: state[key] for key in keys}, tmp_path / file)
    index = {"metadata": {}, "weight_map": {key: file for file, keys in parts.items() for key in keys}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for source in (tmp_path, tmp_path / "model.safetensors.index.json"):
        network = small()
        load_checkpoint(network, source)
        assert_loaded(network, state)
    index["weight_map"][names[0]] = "../elsewhere.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="allowed are files beside the index"):
        load_checkpoint(small(), tmp_path)


def test_folders_without_weights(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has none of model.safetensors"):
        load_checkpoint(small(), tmp_path)
    (tmp_path / "epoch-3.pth").touch()
    with pytest.raises(FileNotFoundError, match=r"name one of its files, such as epoch-3.pth"):
        load_checkpoint(small(), tmp_path)
    (tmp_path / ".metadata").touch()
    with pytest.raises(FileNotFoundError, match="dcp_to_torch_save makes one file of it"):
        load_checkpoint(small(), tmp_path)


def archive(name: str, content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as opened:
        opened.writestr(name, content)
    return file.getvalue()


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as opened:
        opened.addfile(tarfile.TarInfo("weights.pth"), io.BytesIO())
    return file.getvalue()


def scripted() -> bytes:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Identity()), file)
    return file.getvalue()


def saved(protocol: int) -> bytes:
    file = io.BytesIO()
    torch.save({"a": [1, {}], "b": "c"}, file, pickle_protocol=protocol)
    return file.getvalue()


def exported() -> bytes:
    file = io.BytesIO()
    torch.export.save(torch.export.export(nn.Identity(), (torch.zeros(1),)), file)
    return file.getvalue()


OTHERS = {
    "git lfs pull": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 49\n",
    r"empty \(0 bytes\)": lambda: b"",
    "an HTML or XML page": lambda: b"\n  <!DOCTYPE html><title>Sign in</title>",
    "an HTML or XML page.*download it again": lambda: b"\xef\xbb\xbf<?xml version='1.0'?><Error>AccessDenied</Error>",
    "gzip: unpack it": lambda: gzip.compress(b"weights"),
    "a tar archive": tar,
    "a zip archive, but not of torch": lambda: archive("weights.pth", b""),
    "an archive of NumPy arrays": lambda: archive("a.npy", b""),
    "a TorchScript archive: give torch.jit.load": scripted,
    "an exported program of torch.export": exported,
    "index of a checkpoint in several files": lambda: (
        b'{"metadata": {}, "weight_map": {"head.weight": "model-1.safetensors"}}'
    ),
    "JSON, not a file of weights": lambda: b'{"error": "not found"}',
    "a pickle that torch.save did not write": lambda: pickle.dumps({"a": 1}, protocol=4),
    "git lfs pull`": lambda: b"\xef\xbb\xbf\nversion https://hawser.github.com/spec/v1\noid sha256:00\n",
    "an HTML or XML page, not": lambda: b"<!-- a comment --><html></html>",
    "an HTML or XML page, not the": lambda: "<html></html>".encode("utf-16"),
    r"but text \('404: Not Found'\): download it again": lambda: b"404: Not Found",
    r"but text \('Entry not found'\)": lambda: b"Entry not found\nsee above\n",
    "not a torch or safetensors file, or a damaged one": lambda: b"ab\xff\xfecd",
    "full of zeros": lambda: bytes(1000),
    "a pickle protocol above 2": lambda: saved(protocol=4),
    "an HDF5 file": lambda: b"\x89HDF\r\n\x1a\n" + bytes(100),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", OTHERS)
def test_files_of_other_kinds_are_named(tmp_path: Path, kind: str, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(OTHERS[kind]())
    with pytest.raises(CheckpointError, match=kind) as error:
        load_checkpoint(small(), path)
    text = str(error.value)
    assert text.startswith(str(path))
    assert "weights_only` set to `False`" not in text
    assert "\n" not in text
    assert "\x1b" not in text


@pytest.mark.parametrize("kept", [0.5, 0.99])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_cut_off_files(tmp_path: Path, state: dict[str, Tensor], kind: str, kept: float) -> None:
    path = tmp_path / "weights.bin"
    if kind == "safetensors":
        path.write_bytes(safetensors.torch.save(state))
    else:
        torch.save({"model": state}, path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(CheckpointError, match="cut-off"):
        load_checkpoint(small(), path)


def test_tensors_that_are_no_plain_ones(state: dict[str, Tensor]) -> None:
    quantised = torch.quantize_per_tensor(state["head.weight"], 0.1, 0, torch.qint8)
    for tensor, kind in ((quantised, "quantised"), (state["head.weight"].to_sparse(), "Tensor in torch.sparse_coo")):
        with pytest.raises(CheckpointError, match=f"head.weight is {kind}, allowed are ordinary dense tensors"):
            load_checkpoint(small(), state | {"head.weight": tensor})


def test_sources_of_other_kinds(tmp_path: Path) -> None:
    for source in (3, None, b"bytes"):
        with pytest.raises(TypeError, match="source: got .*allowed is a path, a state dict or a module"):
            load_checkpoint(small(), source)  # type: ignore[arg-type]
    torch.save(3, tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match=r"list.pth: got a int, allowed is a state dict"):
        load_checkpoint(small(), tmp_path / "list.pth")
    torch.save({"epoch": 1, "when": datetime.date(2026, 1, 1)}, tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match=r"it holds no tensors.*'epoch' \(int\), 'when' \(record\)"):
        load_checkpoint(small(), tmp_path / "none.pth")
