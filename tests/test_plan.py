"""Plans: their memory, the folded parameters, and what they refuse. test_live.py and test_freeze.py run them whole."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from effformer.kernels import fold, launch, plan
from effformer.kernels.bias_attention import prepare_bias
from effformer.kernels.fold import NotFoldableError, Parameters
from effformer.kernels.operators import call
from effformer.kernels.plan import NotPlannableError, Plan
from hypothesis import given
from hypothesis import strategies as st
from machine import DEVICE, DTYPES, ON_GPU, id_of
from torch import Tensor

from effformer import reference
from effformer.attention_bias import expand_bias
from effformer.testing import conv_mlp_case, linear_mlp_case, pool_mixer_case

pytestmark = pytest.mark.usefixtures("kernel_device")


@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 9), st.integers(0, 9)), max_size=30))
def test_what_lives_at_one_time_does_not_overlap(drawn: list[tuple[int, int, int]]) -> None:
    lives = {number: (size, *sorted((one, other))) for number, (size, one, other) in enumerate(drawn)}
    offsets, total = plan._arranged(lives)
    for number, (size, first, last) in lives.items():
        assert offsets[number] % 256 == 0
        assert offsets[number] + size <= total
        for other, (other_size, other_first, other_last) in lives.items():
            if other > number and first <= other_last and other_first <= last:
                before = offsets[number] + size <= offsets[other]
                assert before or offsets[other] + other_size <= offsets[number]
    if lives:  # no more than without sharing
        assert total <= sum(-(-size // 256) * 256 for size, _, _ in lives.values())


def test_places_are_shared() -> None:
    offsets, total = plan._arranged({0: (1000, 1, 2), 1: (1000, 2, 3), 2: (1000, 3, 4), 3: (1000, 4, 5)})
    assert total == 2048
    assert offsets[0] == offsets[2] != offsets[1] == offsets[3]


# --- the fold -------------------------------------------------------------------------------------------------------------


def folded(build: Callable[[Parameters], list[Tensor]], tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The tensors that the fold computes, each in memory of its own."""
    parameters = Parameters(tensors, dtype)
    targets = build(parameters)
    places, size = {}, 0
    for one in parameters.folded:
        places[id(one)] = size
        size += -(-one.numel() * one.element_size() // 256) * 256
    workspace = torch.full((size // 4,), torch.nan, device=DEVICE)
    found = parameters.launch(places, workspace.nbytes, DEVICE)
    assert found is not None
    found.arguments.update(vectors_ptr=workspace, matrices_ptr=workspace.view(dtype))
    launch.run(found)
    by_storage = {one.untyped_storage()._cdata: places[id(one)] for one in parameters.folded}
    return [
        workspace.view(one.dtype).as_strided(
            one.shape, one.stride(), by_storage[one.untyped_storage()._cdata] // one.element_size()
        )
        for one in targets
    ]


@pytest.fixture(params=[False, True], ids=["", "pieces"])
def _pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of 16 elements as well: results of several programs, the last of which has fewer."""
    if request.param:
        monkeypatch.setattr(fold, "block_on", lambda _: 16)


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("dtype", DTYPES, ids=id_of)
@pytest.mark.parametrize("conv_bias", [False, True])
@pytest.mark.parametrize("layer_scale", [False, True])
def test_batch_norms_are_folded(dtype: torch.dtype, conv_bias: bool, layer_scale: bool) -> None:
    bias, weight, shift, mean, var, gamma = (torch.rand(37).add(0.5).to(dtype) for _ in range(6))
    arguments = (bias if conv_bias else None, weight, shift, mean, var, 0.01, gamma if layer_scale else None)
    tensors = [one for one in arguments if isinstance(one, Tensor)]
    found = folded(lambda parameters: list(parameters.fold_batch_norm(*arguments)), tensors, torch.float16)
    for one, expected in zip(found, reference.fold_batch_norm(*arguments), strict=True):
        assert one.dtype == torch.float32
        assert torch.allclose(one, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=id_of)
def test_layer_scales_vectors_and_means(dtype: torch.dtype) -> None:
    bias, gamma, other = (torch.randn(21).to(dtype) for _ in range(3))
    one, two = (torch.randn(5, 8).to(dtype) for _ in range(2))

    def build(parameters: Parameters) -> list[Tensor]:
        means = parameters.mean(bias, other), parameters.mean(one, two)
        return [*parameters.fold_layer_scale(bias, gamma), parameters._affine(bias=bias)[1], *means]

    scale, shift, own, mean, mean_of_matrices = folded(build, [bias, gamma, other, one, two], torch.float16)
    expected = reference.fold_layer_scale(bias, gamma)
    assert torch.equal(scale, expected[0])
    assert torch.allclose(shift, expected[1], rtol=1e-6)
    assert torch.equal(own, bias.float())
    assert torch.equal(mean, (bias.float() + other.float()) / 2)
    assert torch.equal(mean_of_matrices, ((one.float() + two.float()) / 2).half())


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=id_of)
def test_matrices_and_filters_of_any_strides_are_copied(dtype: torch.dtype) -> None:
    filters = torch.randn(6, 5, 3, 3)
    matrix = torch.randn(7, 10)
    given = [filters, filters.flip(0), filters[:, :3, 1:], filters[::2], matrix[:, 1:4], matrix.t(), matrix[1:, 0]]
    for source in given[:-1]:
        (found,) = folded(lambda parameters, x=source: [parameters._matrix(x, None, 1.0)], [source], dtype)
        assert torch.equal(found, source.to(dtype))
        assert found.ndim == 2 or found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("sides", [(3, 3), (5, 2), (1, 4), (7, 7)], ids=str)
def test_attention_biases_are_expanded_and_prepared(sides: tuple[int, int]) -> None:
    table = torch.randn(2, 9)
    table[0, 4] = torch.finfo(torch.float32).min
    (found,) = folded(lambda parameters: [parameters.expand_bias(table, *sides, 3, 4, 8)], [table], torch.float16)
    bias = expand_bias(table, *sides, resolution=3)
    expected = prepare_bias(bias, 4, 8, torch.float16)
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_an_infinite_entry_touches_no_other() -> None:
    table = torch.randn(1, 9)
    table[0, 4] = -torch.inf
    (found,) = folded(lambda parameters: [parameters.expand_bias(table, 3, 3, 3, 4, 8)], [table], torch.float16)
    masked = reference.bias_index(3, 3, DEVICE) == 4
    assert torch.equal(found[0, :, :9].isinf(), masked)
    assert not found.isnan().any()


def test_parameters_are_read_in_place_where_they_can_be() -> None:
    matrix, vector, filters = torch.randn(4, 8).half(), torch.randn(8), torch.randn(4, 8, 3, 3).half()
    last = filters.to(memory_format=torch.channels_last)
    halved, doubled = vector.half(), matrix.float()
    parameters = Parameters([matrix, vector, filters, last, halved, doubled], torch.float16)
    for one in (matrix, vector, last):
        stands_for = parameters.own(one)
        assert (stands_for.shape, stands_for.stride(), stands_for.dtype) == (one.shape, one.stride(), one.dtype)
    assert [place for _, place in parameters.kept] == [0, 1, 3]
    assert parameters.folded == []
    for one in (filters, halved, doubled):
        parameters.own(one)
    assert len(parameters.folded) == 3
    odd = torch.randn(9)[1:]  # not at a multiple of 16 bytes
    others = Parameters([odd], torch.float16)
    others.own(odd)
    assert (len(others.folded), len(others.kept)) == (1, 0)


def test_what_the_fold_cannot_read() -> None:
    double, gaps = torch.randn(8).double(), torch.randn(8, 2)[:, 0]
    one, other, table = torch.randn(4, 8), torch.randn(8, 4).t(), torch.randn(2, 9)
    tensors = [double, gaps, one, other, table]
    for build, match in (
        (lambda parameters: parameters.upcast(double), "float64"),
        (lambda parameters: parameters.upcast(gaps), "lie apart"),
        (lambda parameters: parameters.mean(one, other), "differ in their layout"),
        (lambda parameters: parameters.upcast(torch.randn(8).half()), "no parameter or buffer"),
        (lambda parameters: parameters.expand_bias(table, 2, 2, 4, 4, 8), "9 entries, and not 16"),
    ):
        with pytest.raises(NotFoldableError, match=match):
            build(Parameters(tensors, torch.float32))


# --- plans ----------------------------------------------------------------------------------------------------------------


def chain(dtype: torch.dtype = torch.float32) -> tuple[Callable[[Tensor], Tensor], Tensor, Parameters, list[Tensor]]:
    """Two MLPs on tokens, one after the other."""
    case = linear_mlp_case(torch.randn(2, 5, 16, dtype=dtype), hidden=32)
    x, *tensors = case.arguments
    parameters = Parameters(tensors, dtype)
    own = [parameters.own(tensor) for tensor in tensors]

    def forward(x: Tensor) -> Tensor:
        for _ in range(2):
            x = call("linear_mlp", x, own, case.options)
        return x

    return forward, x, parameters, tensors


def test_a_plan_repeats_its_launches() -> None:
    forward, x, parameters, tensors = chain()
    made = Plan(forward, x, parameters, tensors)
    with launch.recorded() as launches:
        found = made(x, lambda: tensors)
    assert len(launches) == 6
    case = linear_mlp_case(x, hidden=32)
    options = case.options
    expected = call("linear_mlp", call("linear_mlp", x, tensors, options), tensors, options)
    assert torch.equal(found, expected)
    other = torch.randn_like(x)
    assert not torch.equal(made(other, lambda: tensors), found)
    tensors[-1].add_(1)  # in all channels, which the norm takes away again
    assert torch.allclose(made(x, lambda: tensors), found + 2, atol=1e-5)


def test_views_of_results_in_between() -> None:
    """A launch that reads a part of what another wrote."""
    forward, x, parameters, tensors = chain()
    made = Plan(lambda x: forward(forward(x)[:, 2:]), x, parameters, tensors)
    case = linear_mlp_case(x, hidden=32)
    expected = x
    for first in (0, 0, 2, 0):
        expected = call("linear_mlp", expected[:, first:], tensors, case.options)
    assert torch.allclose(made(x, lambda: tensors), expected, atol=1e-6)


def test_no_launch_is_recorded_while_planning() -> None:
    with launch.recorded() as launches:
        Plan(*chain())
    assert launches == []


def test_plans_refuse_what_is_no_launch() -> None:
    forward, x, parameters, tensors = chain()
    for wrong, match in (
        (lambda x: forward(x + 1), "x_ptr of layer_norm_kernel is computed outside the kernels"),
        (lambda x: forward(x) + 1, "a result is not what a launch wrote"),
        (lambda x: forward(x)[1:], "as a whole"),
        (lambda x: x, "a result"),
    ):
        with pytest.raises(NotPlannableError, match=match):
            Plan(wrong, x, parameters, tensors)


def test_plans_refuse_additions_in_any_order() -> None:
    case = conv_mlp_case(torch.randn(1, 96, 4, 4).half(), hidden=384)
    x, *tensors = case.arguments
    parameters = Parameters(tensors, x.dtype)
    own = [parameters.own(tensor) for tensor in tensors]
    with pytest.raises(NotPlannableError, match="cleared"):
        Plan(lambda x: call("conv_mlp", x, own, case.options | {"deterministic": False}), x, parameters, tensors)


def test_several_results_of_one_plan() -> None:
    case = pool_mixer_case(torch.randn(2, 16, 4, 4).to(memory_format=torch.channels_last))
    x, *tensors = case.arguments
    parameters = Parameters(tensors, x.dtype)
    own = [parameters.own(tensor) for tensor in tensors]

    def forward(x: Tensor) -> list[Tensor]:
        first = call("pool_mixer", x, own, {})
        return [first, call("pool_mixer", first, own, {}).flatten(2).transpose(1, 2)]

    first, second = Plan(forward, x, parameters, tensors)(x, lambda: tensors)
    assert torch.allclose(first, reference.pool_mixer(x, tensors[0]), atol=1e-5)
    assert torch.allclose(second, reference.pool_mixer(first, tensors[0]).flatten(2).mT, atol=1e-5)


def test_every_operator_is_called_by_its_names() -> None:
    x = torch.randn(1, 3, 5, 5)
    weight, scale, shift = torch.randn(4, 3, 3, 3), torch.rand(4), torch.randn(4)
    found = call("conv_norm", x, (weight, scale, shift), {"activation": "relu", "unknown": 1})
    expected = F.relu(F.conv2d(x, weight, stride=2, padding=1) * scale[:, None, None] + shift[:, None, None])
    assert torch.allclose(found, expected, atol=1e-5 if not ON_GPU else 1e-2)
