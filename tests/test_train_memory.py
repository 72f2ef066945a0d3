"""Bytes that a whole network keeps for the backward, counted without computing: on tensors without values."""

from __future__ import annotations

import pytest
import torch
from effformer.kernels.launch import INTERPRETED
from machine import DEVICE
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import effformer

pytestmark = pytest.mark.skipif(not INTERPRETED or DEVICE.type != "cpu", reason="counted on the CPU")
BATCH = 256


def kept(backend: str, *, training: bool, autocast: bool, batch: int = BATCH) -> float:
    """MB an image of L1 in 16 bits, parameters and buffers left out."""
    model = effformer.create_model("efficientformer_l1", backend=backend)
    model = (model if autocast else model.half()).to(memory_format=torch.channels_last).train(training)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    tensors = {
        name: mode.from_tensor(one.detach()).requires_grad_(one.requires_grad)
        for name, one in [*model.named_parameters(), *model.named_buffers()]
    }
    known = {one.untyped_storage()._cdata for one in tensors.values()}
    sizes: dict[int, int] = {}

    def keep(one: Tensor) -> Tensor:
        storage = one.untyped_storage()
        if storage._cdata not in known:
            sizes[storage._cdata] = storage.nbytes()
        return one

    with mode:
        images = torch.randn(batch, 3, 224, 224, dtype=torch.float32 if autocast else torch.float16)
        images = images.to(memory_format=torch.channels_last)
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one),
            torch.autocast("cpu", torch.float16, enabled=autocast),
        ):
            result = torch.func.functional_call(model, tensors, (images,))  # alive, and with it what is kept
    del result
    return sum(sizes.values()) / 1e6 / batch


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("training", "most", "eager"), [(False, 4.65, 33.4), (True, 6.53, 35.3)])
def test_bytes_kept_by_l1(training: bool, most: float, eager: float, autocast: bool) -> None:
    """The figures of docs/training.md: input image, stem and downsamplings as PyTorch's modules keep them included."""
    assert kept("triton", training=training, autocast=autocast) <= most
    assert kept("eager", training=training, autocast=autocast) >= eager


def test_small_batches_keep_less_than_eager() -> None:
    for training in (False, True):
        ours, eager = (kept(backend, training=training, autocast=False, batch=8) for backend in ("triton", "eager"))
        assert ours < 0.25 * eager
