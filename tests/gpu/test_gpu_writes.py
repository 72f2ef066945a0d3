"""A launch writes all of its output and nothing else, and memory around its arguments does not change the result.

Each launch of an operation runs a second time in poisoned surroundings: its arguments lie in NaN, and its output in
NaN of a pattern that no arithmetic makes.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from effformer.kernels.launch import Launch, recorded
from gpu_cases import WORKS, Work
from machine import DTYPES, finite, id_of, prepared, same

from effformer.testing import (
    Case,
    attention_mixer_case,
    bias_attention_case,
    draw_map,
    head_case,
    linear_mlp_case,
    meta4d_case,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernel_device")]
MARGIN = 4096  # elements on both sides: keeps the alignment that kernels are compiled for
INTEGERS = {2: torch.int16, 4: torch.int32}


def surrounded(like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor of `like`'s shape and strides in the middle of a buffer, and the buffer; both NaN, with all bits set."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True))
    buffer = torch.full((extent + 2 * MARGIN,), -1, dtype=INTEGERS[like.dtype.itemsize]).view(like.dtype)
    assert buffer.isnan().all()
    return buffer.as_strided(like.shape, like.stride(), MARGIN), buffer


def run_surrounded(launch: Launch) -> None:
    """Run `launch` again in poisoned surroundings; its result must be that of the first time, bit by bit."""
    arguments = dict(launch.arguments)
    for name, argument in launch.arguments.items():
        if isinstance(argument, torch.Tensor):
            inner, buffer = surrounded(argument)
            if name == "out_ptr":
                out, outer = inner, buffer
            else:
                inner.copy_(argument)
            arguments[name] = inner
    replace(launch, arguments=arguments).run()
    same(out, launch.arguments["out_ptr"])  # type: ignore[arg-type]
    bits = outer.view(INTEGERS[out.dtype.itemsize])
    bits.as_strided(out.shape, out.stride(), MARGIN).fill_(-1)
    touched = (bits != -1).nonzero().flatten() - MARGIN
    assert not len(touched), f"{launch.kernel.__name__} wrote beyond its output, from element {touched[:8].tolist()}"


def check(case: Case) -> None:
    with recorded() as launches:
        result = case.run("triton")
    assert launches
    finite(result)
    for launch in launches:
        run_surrounded(launch)


@pytest.mark.parametrize("dtype", DTYPES, ids=id_of)
@pytest.mark.parametrize("work", WORKS, ids=str)
def test_real_sizes(work: Work, dtype: torch.dtype) -> None:
    check(work.case(3, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=id_of)
@pytest.mark.parametrize("channels", [1, 13, 48, 61, 230])
def test_odd_sizes(channels: int, dtype: torch.dtype) -> None:
    """No number of rows, channels or hidden channels fits a tile: every mask is at work."""
    check(meta4d_case(draw_map((1, channels, 5, 27), dtype), 2 * channels + 3))
    check(meta4d_case(draw_map((1, channels, 5, 3), dtype, "cropped"), 5))
    x = torch.randn(3, 67, channels).to(dtype)
    check(linear_mlp_case(x, 2 * channels + 3))
    check(head_case(x, 2 * channels + 3))
    check(head_case(x))
    check(attention_mixer_case(x, num_heads=3, key_dim=5, value_dim=9))


@pytest.mark.parametrize("dtype", DTYPES, ids=id_of)
@pytest.mark.parametrize(("tokens", "key_dim", "value_dim"), [(1, 1, 1), (65, 17, 33), (200, 40, 130), (20, 8, 300)])
def test_odd_heads(tokens: int, key_dim: int, value_dim: int, dtype: torch.dtype) -> None:
    case = bias_attention_case(2, tokens, dtype, num_heads=3, key_dim=key_dim, value_dim=value_dim)
    check(case)
    check(prepared(case))
