"""Tests run on a CPU, but for those of the kernels, which run on a GPU where there is one (see machine.py).

Where there is none, Triton's interpreter is switched on, and tests marked `gpu` are skipped.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

sys.path.insert(0, str(Path(__file__).parent / "golden"))  # seeded.py

from effformer import EfficientFormer, EfficientFormerConfig
from effformer.config import PRESETS
from effformer.testing import randomise

NETSPRESSO_L1: dict[str, Any] = {
    "name": "efficientformer",
    "params": {
        "num_attention_heads": 8,
        "attention_channels": 256,
        "attention_dropout_prob": 0.0,
        "attention_value_expansion_ratio": 4,
        "ffn_intermediate_ratio": 4,
        "ffn_dropout_prob": 0.0,
        "ffn_act_type": "gelu",
        "vit_num": 1,
    },
    "stage_params": [
        {"num_blocks": 3, "channels": 48},
        {"num_blocks": 2, "channels": 96},
        {"num_blocks": 6, "channels": 224},
        {"num_blocks": 4, "channels": 448},
    ],
}


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)  # the workers are as many as the cores
    # Without one, hypothesis draws a seed itself, and shows it after failures alone.
    if getattr(config.option, "hypothesis_seed", "") is None:
        config.option.hypothesis_seed = str(random.SystemRandom().randrange(2**32))


def pytest_report_header(config: pytest.Config) -> str:
    seed = getattr(config.option, "hypothesis_seed", None)
    return f"random shapes: --hypothesis-seed={seed}" if seed else "no hypothesis: tests with random shapes are skipped"


def pytest_collection_finish() -> None:
    """Collect garbage more seldom, which took half a minute; on a GPU, garbage may hold memory that others want."""
    if torch.cuda.is_available():
        return
    gc.freeze()  # modules are never garbage
    gc.set_threshold(20_000, 20, 20)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]  # `keywords` has folders' names, too
    if not marked:
        return
    from machine import ON_GPU, REHEARSED

    if ON_GPU:
        return
    reason = "TRITON_INTERPRET is set" if torch.cuda.is_available() else "no NVIDIA GPU"
    for item in marked:
        if not REHEARSED:
            item.add_marker(pytest.mark.skip(reason=reason))
        elif item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason=f"{reason}, and nothing to rehearse without"))


@pytest.fixture(scope="session", autouse=True)
def _quick_interpreter() -> Iterator[None]:
    from machine import ON_GPU

    if ON_GPU:
        yield
        return
    from quick_interpreter import KNOWN, QUICK, using

    with using(QUICK) if KNOWN else contextlib.nullcontext():
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def kernel_device(record_property: Callable[[str, object], None]) -> Iterator[None]:
    """Put new tensors where the kernels run, turn TF32 off, and report the errors that the test measured."""
    from machine import DEVICE, notes

    # PyTorch lets convolutions round float32 to TF32, which is eager's error many times over. (The newer flags,
    # `fp32_precision`, cannot be read through the older ones any more, once set; these can be read through both.)
    convolutions = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    torch.set_default_device(DEVICE)
    torch.empty(1)  # CUDA starts here, and not within what a test times
    notes()
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.backends.cudnn.allow_tf32 = convolutions
        for note in notes():
            record_property("errors", note)
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # other workers want memory, too


@pytest.fixture
def many_rows() -> Iterator[None]:
    """Use the tiles for many rows: tests are small, and few rows would take other tiles (see test_split.py).

    The network's end keeps its own entries: its rows are images, and tests have both few and many.
    """
    from effformer.kernels.tiling import choose as config

    entries = config.shipped_table().entries
    many = (e for e in entries if "head" in e.operations or "rows" not in {dimension for dimension, *_ in e.where})
    with config.using(config.Table(many)):
        yield


@pytest.fixture
def narrow() -> Callable[..., EfficientFormer]:
    """Build a small network of every kind of part, in eval mode and float64, with randomised weights."""

    def build(*, seed: int = 0, dtype: torch.dtype = torch.float64, **overrides: Any) -> EfficientFormer:
        fields = {"depths": (1, 1, 2, 2), "widths": (8, 12, 16, 24), "num_vit": 1, "num_heads": 2, "key_dim": 4}
        names = EfficientFormerConfig.__dataclass_fields__
        config = EfficientFormerConfig(**fields | {k: v for k, v in overrides.items() if k in names})  # type: ignore[arg-type]
        arguments = {"num_classes": 10} | {key: value for key, value in overrides.items() if key not in names}
        network = EfficientFormer(config, dtype=dtype, **arguments)
        return randomise(network, seed).eval()

    return build


@pytest.fixture(scope="session")
def timm() -> Any:
    from effformer.bench.measure.timm_model import import_timm

    return import_timm()


# --- of several files -------------------------------------------------------------------------------------------------
# They import what they need themselves: Pillow may be missing, and Triton must not come too early.

pytest.register_assert_rewrite("frozen_results")  # a helper whose assertions have no messages


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests of the command stay on the CPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A picture with structure at every scale, 300x400."""
    from PIL import Image, ImageFilter

    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (300, 400, 3), generator=generator, dtype=torch.uint8)
    image = Image.frombytes("RGB", (400, 300), bytes(noise.flatten().tolist()))
    image = Image.blend(image, image.filter(ImageFilter.GaussianBlur(9)), 0.7)
    path = tmp_path / "photos" / "photo.png"
    path.parent.mkdir()
    image.save(path)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures in each of six class folders."""
    from labelled_photos import SYNSETS, draw

    folder = tmp_path_factory.mktemp("photos")
    for index in range(18):
        draw(folder / SYNSETS[index // 3] / f"{index % 3}.jpg", index)
    return folder


@pytest.fixture
def no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("effformer.kernels.launch.INTERPRETED", False)


@pytest.fixture
def narrow_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network with the same kernels in it as L1, and less to interpret: one kernel in a 4D block, and three."""
    widths, heads = (16, 32, 48, 240), {"num_heads": 2, "key_dim": 16, "value_ratio": 1}
    config = EfficientFormerConfig(depths=(1, 1, 1, 2), widths=widths, num_vit=1, mlp_ratio=1, **heads)
    monkeypatch.setitem(PRESETS, "narrow", config)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace torch.compile by eager PyTorch: Inductor takes half a minute."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


@pytest.fixture
def few_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeat candidates twice only: the interpreter gives the same bits, unless a test has it give others."""
    from effformer.bench.offline import tune

    monkeypatch.setattr(tune, "REPEATS", 2)
