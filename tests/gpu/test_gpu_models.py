"""Whole networks in each dtype: errors against float64, compared with eager's; and the kernels that ran."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from effformer.kernels.launch import recorded
from gpu_cases import MODELS, network
from machine import DTYPES, REHEARSED, id_of, measured, same

from effformer import EfficientFormer, set_backend
from effformer.testing import accuracy, draw_map

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernel_device")]
SIZES = [(2, 64, 96)] if REHEARSED else [(8, 224, 224), (2, 512, 640), (3, 97, 161)]


def check(name: str, model: EfficientFormer, x: torch.Tensor) -> None:
    """The feature maps, all four, and the logits, by the accuracy rule; `model` ends up in float64, on eager."""
    triton = [model(x), *model.forward_intermediates(x, intermediates_only=True)]
    set_backend(model, "eager")
    eager = [model(x), *model.forward_intermediates(x, intermediates_only=True)]
    model.double()
    exact = [model(x.double()), *model.forward_intermediates(x.double(), intermediates_only=True)]
    wrong = []
    for index, (result, its_exact, its_eager) in enumerate(zip(triton, exact, eager, strict=True)):
        assert its_exact.std() > 0.1
        found = accuracy(result, its_exact, its_eager)
        part = f"stage {index}" if index else "logits"
        measured(name, result, found)
        if not found.passes():
            wrong.append(f"{part}: {found}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("dtype", DTYPES, ids=id_of)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_whole_network(name: str, size: tuple[int, int, int], dtype: torch.dtype) -> None:
    batch, height, width = size
    model = network(name, dtype, "triton").to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    check(name, model, draw_map((batch, 3, height, width), dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=id_of)
@torch.no_grad()
def test_contiguous_images(dtype: torch.dtype) -> None:
    """A network that is not channels_last: blocks copy maps, or pool them in their own layout."""
    batch, height, width = SIZES[0]
    check(MODELS[0], network(MODELS[0], dtype, "triton"), draw_map((batch, 3, height, width), dtype, "contiguous"))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_what_is_launched(name: str) -> None:
    """Every block runs on the kernels, and PyTorch computes none."""
    model = network(name, torch.float16, "triton")
    with recorded() as launches:
        model(draw_map((1, 3, 64, 96), torch.float16))
    seen = Counter(launch.kernel.__name__ for launch in launches)
    config = model.config
    assert seen["bias_attention_kernel"] == config.num_vit
    assert seen["layer_norm_kernel"] == 2 * config.num_vit
    mlps = seen["mlp_kernel"] + seen["split_mlp_kernel"] + (seen["linear_kernel"] - 2 * config.num_vit) // 2
    assert mlps == sum(config.depths)
    assert seen["split_sum_kernel"] == seen["split_mlp_kernel"]


@pytest.mark.cuda
@torch.no_grad()
def test_auto_is_triton() -> None:
    x = draw_map((4, 3, 224, 224), torch.bfloat16)
    same(network(MODELS[0], torch.bfloat16, "auto")(x), network(MODELS[0], torch.bfloat16, "triton")(x))
