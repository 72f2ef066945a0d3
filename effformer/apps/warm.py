"""`warm`: compile a live model's kernels before they are needed."""

from __future__ import annotations

import torch

from ..backend import why_not_triton
from ..checks import check_shapes
from ..model.netspresso import Backbone, network_within
from ..model.network import EfficientFormer


def warm(model: EfficientFormer | Backbone, *shapes: tuple[int, int, int], dtype: torch.dtype | None = None) -> None:
    """Compile the kernels of a live model's forward for images of these shapes, side by side, and load them.

    A kernel takes seconds to compile, and the first forward of a shape waits for all that are new. Triton keeps
    compiled kernels on disk. Call it as forwards will run: in eval mode, under their autocast.

    Where the kernels cannot run, nothing is done.

    Args:
        model: an `EfficientFormer` or a `Backbone` in eval mode. It is not changed, but its hooks are called, twice for
            each shape, and once with values that were never written.
        shapes: (batch, height, width) of the images, one or more.
        dtype: of the images, by default the model's.

    Raises:
        TypeError: for another model, or a dtype that is not floating.
        ValueError: for other shapes, or a model with a part in training mode.
    """
    network = network_within(model)
    weight = next(network.parameters())
    dtype = weight.dtype if dtype is None else dtype
    sizes = check_shapes(shapes)
    if not sizes:
        raise ValueError("shapes: got none, allowed is (batch, height, width), one or more")
    if not dtype.is_floating_point:
        raise TypeError(f"dtype: got {dtype}, allowed is a floating one")
    training = [name or "the model" for name, module in network.named_modules() if module.training]
    if training:
        raise ValueError(f"model: got {training[0]} in training mode, allowed is eval mode: call model.eval()")
    if why_not_triton(weight.device, asked_for=True) is not None:
        return
    from ..kernels.launch import compile_within

    for batch, height, width in sizes:
        x = torch.zeros(batch, network.in_chans, height, width, dtype=dtype, device=weight.device)
        with torch.no_grad():
            with compile_within():
                network(x)
            network(x)
