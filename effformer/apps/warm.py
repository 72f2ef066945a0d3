"""`warm`: compile a live model's kernels before they are needed."""

from __future__ import annotations

import torch

from ..backend import why_not_triton
from ..checks import check_count
from ..model.netspresso import Backbone, network_within
from ..model.network import EfficientFormer


def warm(model: EfficientFormer | Backbone, *shapes: tuple[int, int, int], dtype: torch.dtype | None = None) -> None:
    """Compile the kernels of a live model's forward for images of these shapes, side by side, and load them.

    A kernel takes one to four seconds to compile, and the first forward of a shape waits for all that are new. Triton
    keeps what is compiled on disk. Call it as forwards will run: in eval mode, under their autocast.

    Args:
        model: an `EfficientFormer` or a `Backbone`; it is not changed. Its hooks are called.
        shapes: (batch, height, width) of the images.
        dtype: of the images, by default the model's.

    Raises:
        ValueError: for other shapes.
    """
    network = network_within(model)
    weight = network.stem.conv1.weight
    for shape in shapes:
        if len(shape) != 3:
            raise ValueError(f"shapes: got {shape}, allowed are (batch, height, width)")
        for size in shape:
            check_count("shapes", size, least=1)
    if network.training:
        raise ValueError("model: got one in training mode, allowed is one in eval mode: call model.eval()")
    for batch, height, width in shapes:
        x = torch.zeros(batch, network.in_chans, height, width, dtype=dtype or weight.dtype, device=weight.device)
        with torch.no_grad():
            if why_not_triton(weight.device, asked_for=True) is None:
                from ..kernels.launch import compile_within

                with compile_within():
                    network(x)
            network(x)
