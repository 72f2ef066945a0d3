"""The MLP for few rows, its hidden channels split over programs: against float64, and the memory of its parts."""

from __future__ import annotations

import warnings

import pytest
import torch
from effformer.kernels import conv_mlp, linear_mlp, meta4d
from effformer.kernels.launch import Launch, recorded
from effformer.kernels.tiling.choose import preferring
from effformer.kernels.tiling.device import CLASSES
from effformer.kernels.tiling.table import DTYPES as TABLE_DTYPES
from effformer.kernels.tiling.table import Entry, SplitConfig
from machine import DTYPES, INTERPRETED, check, room, same

from effformer import ops
from effformer.testing import (
    LAYOUTS,
    Case,
    accuracy,
    conv_mlp_case,
    draw_map,
    linear_mlp_case,
    meta4d_case,
    unwritten_is_nan,
)

pytestmark = pytest.mark.usefixtures("kernel_device")
OPERATORS = {"meta4d": meta4d.meta4d, "conv_mlp": conv_mlp.conv_mlp, "linear_mlp": linear_mlp.linear_mlp}
TILES = SplitConfig(16, 16, 32, 4, 2)
NAN, INF = float("nan"), float("inf")


def splitting(tiles: SplitConfig = TILES):  # type: ignore[no-untyped-def]
    """Within it every MLP is split."""
    return preferring(Entry(tuple(OPERATORS), tuple(CLASSES), tuple(TABLE_DTYPES.values()), (), tiles))


def launches_of(case: Case, **options: bool) -> list[Launch]:
    with torch.no_grad(), recorded() as launches:
        getattr(ops, case.operation)(*case.arguments, **case.options, **options, backend="triton")
    return launches


def split_of(case: Case, **options: bool) -> list[Launch]:
    """The launches of `case`, the last two of which are the parts and their sum."""
    launches = launches_of(case, **options)
    kernels = [launch.kernel.__name__ for launch in launches]
    assert kernels[-2:] == ["split_mlp_kernel", "split_sum_kernel"], kernels
    return launches


@pytest.mark.parametrize(("channels", "height", "width"), [(224, 5, 7), (320, 5, 13), (768, 3, 6)])
def test_published_widths(channels: int, height: int, width: int) -> None:
    """With the table's tiles, the last of them in part; a chunk of the hidden channels, and a part of one."""
    case = meta4d_case(draw_map((1, channels, height, width), torch.float16), 100)
    assert len(split_of(case)) == 2
    check(case, ulps=0)


def test_published_tokens() -> None:
    case = linear_mlp_case(torch.randn(1, 33, 448).half(), 200)
    assert len(split_of(case)) == 3
    check(case, ulps=0)


def test_many_rows_are_not_split() -> None:
    for case in (
        meta4d_case(draw_map((2, 80, 32, 33), torch.float16), 9),
        meta4d_case(draw_map((9, 48, 4, 4), torch.float16), 9),
    ):
        assert [launch.kernel.__name__ for launch in launches_of(case)] == ["mlp_kernel"]
    case = linear_mlp_case(torch.randn(9, 57, 80), 9)
    assert [launch.kernel.__name__ for launch in launches_of(case)] == ["layer_norm_kernel", *["linear_kernel"] * 2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "hidden"), [(13, 64), (48, 70), (100, 1), (100, 33)])
def test_sizes_that_no_tile_fits(channels: int, hidden: int, dtype: torch.dtype) -> None:
    """39 rows are two tiles and a part; 64 hidden channels two chunks, 33 and 70 one more, in which little is left."""
    with splitting():
        x = draw_map((1, channels, 3, 13), dtype)
        check(meta4d_case(x, hidden), ulps=1)
        check(conv_mlp_case(x, hidden, "silu"), ulps=1)
        check(linear_mlp_case(torch.randn(3, 13, channels).to(dtype), hidden), ulps=1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    with splitting():
        case = meta4d_case(draw_map((3, 24, 3, 5), torch.float16, layout), 40)
        check(case, ulps=0.5)
        nearer = Case(case.operation, (case.arguments[0].contiguous(), *case.arguments[1:]), case.options)
        same(case.run("triton"), nearer.run("triton"))
    tokens = torch.randn(2, 24, 20).half().mT
    with splitting():
        check(linear_mlp_case(tokens, 40), ulps=0.5)


def test_no_rows() -> None:
    with splitting():
        for case in (
            meta4d_case(draw_map((0, 48, 5, 5), torch.float16), 96),
            linear_mlp_case(torch.randn(0, 9, 48), 9),
        ):
            assert case.run("triton").shape == case.run("eager").shape


def test_special_values_stay_where_they_are() -> None:
    x = draw_map((2, 24, 5, 7), torch.float16)
    x[0, 5, 0, 0], x[1, 7, 4, 6] = NAN, INF
    with splitting():
        case = meta4d_case(x, 48)
        assert not case.exact().isfinite().all()
        assert case.exact().isfinite().sum() > x.numel() // 2
        check(case)
        check(conv_mlp_case(x, 48))


@pytest.mark.parametrize("deterministic", [True, False])
def test_all_parts_are_written_and_none_beyond(deterministic: bool) -> None:
    """The parts' memory is NaN before, and rows beyond the last are not written."""
    case = meta4d_case(draw_map((1, 20, 3, 13), torch.float16), 70)
    with splitting(), unwritten_is_nan(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "deterministic")
        parts = split_of(case, deterministic=deterministic)[0].arguments["out_ptr"]
    assert isinstance(parts, torch.Tensor)
    assert parts.shape == (3 if deterministic else 1, 39, 20)
    assert parts.isfinite().all()


def test_the_sum_leaves_the_parts_alone() -> None:
    """A thread that cleared them might do so before another thread, to whom the compiler gave them, has read them."""
    with splitting():
        first, last = split_of(meta4d_case(draw_map((1, 20, 3, 13), torch.float16), 70), deterministic=False)
    parts = first.arguments["out_ptr"]
    assert isinstance(parts, torch.Tensor)
    before = parts.normal_().clone()
    last.run()
    same(parts, before)


def test_the_gain_of_the_hidden_is_taken_out_of_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16's GELU, in float16: the interpreter has no bfloat16."""
    from effformer.kernels import activation

    monkeypatch.setitem(activation._GELU, torch.float16, "gelu_exp3_x2")
    with splitting():
        check(meta4d_case(draw_map((1, 48, 3, 13), torch.float16), 70), ulps=0.5)


def test_it_repeats_itself() -> None:
    case = meta4d_case(draw_map((1, 20, 3, 13), torch.float16), 70)
    with splitting():
        first = case.run("triton")
        for _ in range(2):
            same(case.run("triton"), first)


# --- in any order -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", OPERATORS)
def test_atomic_sums_are_as_accurate(operation: str) -> None:
    x = draw_map((1, 20, 3, 13), torch.float16)
    case = {
        "meta4d": lambda: meta4d_case(x, 70),
        "conv_mlp": lambda: conv_mlp_case(x, 70),
        "linear_mlp": lambda: linear_mlp_case(x.flatten(2).mT, 70),
    }[operation]()
    with splitting():
        assert split_of(case, deterministic=False)[-1].constants["PARTS"] == 1
        found = getattr(ops, operation)(*case.arguments, **case.options, deterministic=False, backend="triton")
        assert accuracy(found, case.exact(), case.run("eager")).passes(0.5 if INTERPRETED else 2.0)


@pytest.mark.parametrize("operation", OPERATORS)
def test_what_is_not_deterministic_is_refused_where_pytorch_is_told_to(operation: str) -> None:
    x = draw_map((1, 16, 3, 3), torch.float32)
    case = {"meta4d": meta4d_case, "conv_mlp": conv_mlp_case}.get(operation, lambda x, h: linear_mlp_case(x[0], h))(
        x, 9
    )

    def call(deterministic: bool, backend: str) -> torch.Tensor:
        result: torch.Tensor = getattr(ops, operation)(
            *case.arguments, **case.options, deterministic=deterministic, backend=backend
        )
        return result

    try:
        torch.use_deterministic_algorithms(True)
        same(call(True, "triton"), case.run("triton"))
        same(call(False, "eager"), case.run("eager"))
        with pytest.raises(
            RuntimeError,
            match=r"deterministic: got False, allowed under torch.use_deterministic_algorithms\(True\) is True",
        ):
            call(False, "triton")
        torch.use_deterministic_algorithms(True, warn_only=True)
        with pytest.warns(UserWarning, match="deterministic: got False"):
            call(False, "triton")
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("deterministic", [True, False])
def test_opcheck(deterministic: bool) -> None:
    case = meta4d_case(draw_map((1, 20, 3, 6), torch.float32, "contiguous"), 40)
    with splitting():
        torch.library.opcheck(OPERATORS["meta4d"], (*case.arguments, "gelu", deterministic))


# --- offsets beyond 2**31 ---------------------------------------------------------------------------------------------

FAR = 2**31 + 64


def test_offsets_beyond_32_bits() -> None:
    """Images of x, and parts, that lie far apart: gigabytes of addresses, hardly any memory."""
    near = draw_map((2, 16, 3, 7), torch.float16)
    case = meta4d_case(near, 40)
    room(8 * FAR)
    x = torch.empty(FAR + near.numel(), dtype=torch.float16).as_strided(near.shape, (FAR, 1, 7 * 16, 16))
    x.copy_(near)
    with splitting():
        exact = case.run("triton")
        same(Case(case.operation, (x, *case.arguments[1:]), case.options).run("triton"), exact)
        first, last = split_of(case)
    parts = torch.empty(FAR + near.numel())
    first.arguments.update(out_ptr=parts, stride_os=FAR)
    last.arguments.update(parts_ptr=parts, stride_ps=FAR)
    out = last.arguments["out_ptr"]
    assert isinstance(out, torch.Tensor)
    out.fill_(NAN)
    for launch in (first, last):
        launch.run()
    same(out, exact)
