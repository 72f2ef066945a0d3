"""Every fused operation on Triton at random shapes, layouts, dtypes and activations, by the accuracy rule.

The seed is in pytest's header; --hypothesis-seed=N draws the same shapes again.
"""

from __future__ import annotations

import contextlib
from typing import Any

import machine
import pytest
import torch
from effformer.kernels.tiling.choose import preferring, shipped_table, using
from effformer.kernels.tiling.device import CLASSES
from effformer.kernels.tiling.table import DTYPES as DTYPES_OF
from effformer.kernels.tiling.table import Entry, SplitConfig
from machine import prepared

from effformer.backend import TRITON_ACTIVATIONS
from effformer.testing import (
    LAYOUTS,
    Case,
    attention_mixer_case,
    bias_attention_case,
    conv_mlp_case,
    conv_norm_case,
    draw_map,
    head_case,
    linear_mlp_case,
    meta4d_case,
    pool_mixer_case,
)

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis, which draws the shapes, is not installed")
given, st = hypothesis.given, hypothesis.strategies

DTYPES = st.sampled_from(machine.DTYPES)
ACTIVATIONS = st.sampled_from(TRITON_ACTIVATIONS)
SEEDS = st.integers(0, 2**31 - 1)
SPLITS = st.sampled_from([False, False, True])  # of every three one: these are many programs
drawn = hypothesis.settings(max_examples=60, deadline=None, database=None)
if machine.ON_GPU:  # where nearly every example is compiled, for some seconds: fewer, and none to shrink a failure
    drawn = hypothesis.settings(
        drawn,
        max_examples=25,
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
pytestmark = pytest.mark.usefixtures("kernel_device", "many_rows")
SPLIT = Entry(
    ("meta4d", "conv_mlp", "linear_mlp"), tuple(CLASSES), tuple(DTYPES_OF.values()), (), SplitConfig(16, 32, 64, 4, 1)
)


@st.composite
def maps(draw: Any) -> torch.Tensor:
    """[0..3, 1..300, 1..12, 1..12] in any layout; wide ones, which take more kernels than one, are small."""
    channels = draw(st.integers(1, 80) | st.integers(225, 300))
    most = 12 if channels <= 80 else 5
    shape = (draw(st.integers(0, 3)), channels, draw(st.integers(1, most)), draw(st.integers(1, most)))
    torch.manual_seed(draw(SEEDS))
    return draw_map(shape, draw(DTYPES), draw(st.sampled_from(LAYOUTS)))


@st.composite
def tokens(draw: Any) -> torch.Tensor:
    """[0..3, 1..80, 1..80], contiguous, or a channels-first map seen as tokens."""
    shape = (draw(st.integers(0, 3)), draw(st.integers(1, 80)), draw(st.integers(1, 80)))
    torch.manual_seed(draw(SEEDS))
    x = torch.randn(shape).to(draw(DTYPES))
    return x if draw(st.booleans()) else x.mT.contiguous().mT


def check(case: Case) -> None:
    """The accuracy rule, with 8 ulp: a few elements, or those of one hidden channel, may have eager's luck."""
    machine.check(case, ulps=8.0)


def check_mlp(case: Case, split: bool) -> None:
    with preferring(SPLIT) if split else contextlib.nullcontext():
        check(case)


@drawn
@given(maps())
def test_pool_mixer(x: torch.Tensor) -> None:
    check(pool_mixer_case(x))


@drawn
@given(maps(), st.integers(1, 150), ACTIVATIONS, SPLITS)
def test_conv_mlp(x: torch.Tensor, hidden: int, activation: str, split: bool) -> None:
    check_mlp(conv_mlp_case(x, hidden, activation), split)


@drawn
@given(maps(), st.integers(1, 150), ACTIVATIONS, SPLITS)
def test_meta4d(x: torch.Tensor, hidden: int, activation: str, split: bool) -> None:
    check_mlp(meta4d_case(x, hidden, activation), split)


@drawn
@given(maps(), st.integers(8, 40), st.none() | ACTIVATIONS, st.booleans())
def test_conv_norm(x: torch.Tensor, outputs: int, activation: str | None, few: bool) -> None:
    """On the tiles for many rows, and on those for few."""
    with using(shipped_table()) if few else contextlib.nullcontext():
        check(conv_norm_case(x, outputs, activation))


@drawn
@given(SEEDS, DTYPES, *(st.integers(low, high) for low, high in ((0, 3), (1, 150), (1, 5), (1, 70), (1, 70))))
def test_bias_attention(
    seed_: int, dtype: torch.dtype, batch: int, tokens: int, num_heads: int, key_dim: int, value_dim: int
) -> None:
    torch.manual_seed(seed_)
    case = bias_attention_case(batch, tokens, dtype, num_heads=num_heads, key_dim=key_dim, value_dim=value_dim)
    check(prepared(case) if seed_ % 2 else case)


@drawn
@given(tokens(), *(st.integers(1, high) for high in (5, 40, 40)))
def test_attention_mixer(x: torch.Tensor, num_heads: int, key_dim: int, value_dim: int) -> None:
    check(attention_mixer_case(x, num_heads=num_heads, key_dim=key_dim, value_dim=value_dim))


@drawn
@given(tokens(), st.integers(1, 150), ACTIVATIONS, SPLITS)
def test_linear_mlp(x: torch.Tensor, hidden: int, activation: str, split: bool) -> None:
    check_mlp(linear_mlp_case(x, hidden, activation), split)


@drawn
@given(tokens(), st.none() | st.integers(16, 150), st.sampled_from([1, 2, 11]))
def test_head(x: torch.Tensor, classes: int | None, copies: int) -> None:
    check(head_case(x.repeat(copies, 1, 1), classes))
