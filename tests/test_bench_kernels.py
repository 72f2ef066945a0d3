"""The benchmark of the operations on a CPU: its providers, which all compute the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from effformer.bench.measure import operation_providers as providers
from effformer.bench.measure import operations
from effformer.bench.measure.operation_providers import OURS, PROVIDERS, OperationProvider
from effformer.bench.measure.operations import copied, exact_of
from measurements import ATTENTION, BLOCK, DOWN, MLP, POOL, STEM, TOKENS
from torch import Tensor

from effformer.apps.verify import draw
from effformer.apps.verify_report import Check
from effformer.testing import Case
from effformer.workload import OPERATIONS

pytestmark = pytest.mark.usefixtures("uncompiled")
CPU = torch.device("cpu")


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
@pytest.mark.parametrize(
    ("provider", "check"),
    [
        pytest.param(provider, check, id=f"{provider.name}-{check}")
        for provider in PROVIDERS[1:]
        for check in (MLP, POOL, ATTENTION, TOKENS, BLOCK, STEM, DOWN)
        if provider.computes(check.operation)
    ],
)
def test_providers_compute_the_operation(provider: OperationProvider, check: Check) -> None:
    case = draw(check, CPU)
    assert isinstance(case, Case)
    forms = provider.forms(CPU)
    assert forms
    with torch.no_grad():
        for form in forms.values():
            first, second = form(case), form(copied(case))
            for call in (first, second, first):
                result = call()
                assert result.shape == case.run("eager").shape
                assert (result - case.exact()).abs().max() < 1e-5


def test_providers_of_each_operation() -> None:
    found = {op: [provider.name for provider in PROVIDERS if provider.computes(op)][3:] for op in OPERATIONS}
    assert found["bias_attention"] == ["SDPA", "FlexAttention"]
    assert found["meta4d"] == found["conv_mlp"] == found["linear_mlp"] == ["cuBLAS epilogue"]
    assert found["conv_norm"] == ["folded convolution"]
    assert [provider.name for provider in PROVIDERS[:3]] == [OURS, "eager", "torch.compile"], "ours first"
    assert "interpreted kernels are not timed" in (PROVIDERS[0].why_not(CPU, torch.float32) or "")
    assert list(PROVIDERS[3].forms(torch.device("cuda"))) == ["efficient", "cuDNN"]
    assert list(PROVIDERS[4].forms(torch.device("cuda"))) == ["default", "long"]


def test_the_mask_is_as_efficient_kernels_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    attention = F.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor) -> Tensor:
        seen.append(attn_mask)
        return attention(q, k, v, attn_mask=attn_mask)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    (form,) = providers._sdpa(CPU).values()
    case = draw(replace(ATTENTION, dtype=torch.bfloat16), CPU)
    assert isinstance(case, Case)
    form(case)()
    assert seen[0].dtype == torch.bfloat16
    assert seen[0].shape == (3, 2, 9, 9)
    assert seen[0].stride() == (0, 9 * 16, 16, 1)


def test_an_activation_that_cublas_has_not() -> None:
    (form,) = providers._epilogues(CPU).values()
    with pytest.raises(ValueError, match="activation: got relu, allowed is gelu"):
        form(Case("conv_mlp", draw(MLP, CPU).arguments, {"activation": "relu"}))  # type: ignore[union-attr]


def test_what_a_folded_convolution_is_not() -> None:
    (form,) = providers._convolutions(CPU).values()
    case = draw(STEM, CPU)
    assert isinstance(case, Case)
    for options in ({"activation": "gelu"}, {"activation": "relu", "border": torch.ones(3)}):
        with pytest.raises(ValueError, match="allowed are None and relu, without a border"):
            form(replace(case, options=options))
    assert list(providers._convolutions(torch.device("cuda"))) == ["plain", "fused"]


def test_copies_and_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    case = draw(MLP, CPU)
    assert isinstance(case, Case)
    other = copied(case)
    assert other.arguments[0].stride() == case.arguments[0].stride()
    assert not {a.data_ptr() for a in case.arguments} & {a.data_ptr() for a in other.arguments}
    monkeypatch.setattr(operations, "PIECE", 2)
    assert torch.equal(exact_of(case), case.exact())
