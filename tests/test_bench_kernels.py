"""The benchmark of the operations on a CPU, small, with fake clocks: what is measured, in which order, and kept."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from effformer.bench.measure import ceilings
from effformer.bench.measure import operation_providers as providers
from effformer.bench.measure import operations as kernels
from effformer.bench.measure.ceilings import Measured, measure_ceilings
from effformer.bench.measure.operation_providers import OURS, PROVIDERS, Provider
from effformer.bench.measure.operations import (
    DeviceLostError,
    begun,
    bench,
    cells,
    copied,
    exact_of,
    key_of,
    recorded_cells,
)
from effformer.bench.measure.records import Machine, Record, read_records
from effformer.bench.measure.roofline import cost
from effformer.bench.measure.timing import Timing
from torch import Tensor

from effformer import list_models
from effformer.apps.verify import OPERATIONS, draw
from effformer.apps.verify_report import Check
from effformer.cli import main
from effformer.testing import Case

CPU = torch.device("cpu")
MACHINE = Machine("cpu: test", "none", "2.13", "3.7", "abc", "2026-01-01T00:00:00+00:00")
MLP = Check("conv_mlp", (3, 8, 5, 4), torch.float32, {"hidden": 16}, ("here",))
POOL = Check("pool_mixer", (3, 8, 5, 4), torch.float32, {}, ("here", "there"))
ATTENTION = Check("bias_attention", (3, 9, 2 * 13), torch.float32, {"num_heads": 2, "key_dim": 4, "value_dim": 5}, ())
TOKENS = Check("linear_mlp", (3, 9, 8), torch.float32, {"hidden": 16}, ())
STEM = Check("conv_norm", (3, 3, 7, 6), torch.float32, {"outputs": 8, "activation": "relu"}, ())
DOWN = Check("conv_norm", (3, 4, 7, 6), torch.float32, {"outputs": 8, "activation": None}, ())
BLOCK = Check("meta4d", (3, 8, 5, 4), torch.float32, {"hidden": 16}, ())


@pytest.fixture(autouse=True)
def _uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor takes half a minute for what eager PyTorch computes as well."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "cache_folder", lambda: tmp_path / "cache" / "inductor")


# --- who computes -------------------------------------------------------------------------------------------------------


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
def test_providers_compute_the_operation(provider: Provider, check: Check) -> None:
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


def test_who_computes_what() -> None:
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
    monkeypatch.setattr(kernels, "PIECE", 2)
    assert torch.equal(exact_of(case), case.exact())


# --- what is measured ---------------------------------------------------------------------------------------------------


def fake_ceilings(device: torch.device, dtype: torch.dtype) -> Measured:
    """1 TFLOP/s, and 1 GB/s."""
    timing = Timing(1.0, 1.0, 1.0, 1.0, 5)
    return Measured(dtype, 1, replace(timing, p50=2e-9), 500_000, timing)


def fake_timer(make: Callable[[], Callable[[], object]], device: torch.device, footprint: int) -> Timing:
    assert make()() is not None
    return Timing(1.0, 2.0, 4.0, 5.0, 7)


def run(todo: list[Check], *with_: Provider, **options: Any) -> list[list[Record] | None]:
    options = {"timer": fake_timer, "measure": fake_ceilings, "seconds": 60.0} | options
    return list(bench(todo, CPU, MACHINE, attempts=begun(MACHINE), providers=with_ or PROVIDERS[:2], **options))


def provider(name: str, *calls: Callable[[Case], Tensor]) -> Provider:
    """With a form for each of `calls`."""
    return Provider(name, lambda device: {f"form {n}": lambda case, c=c: lambda: c(case) for n, c in enumerate(calls)})


def test_records_of_a_cell() -> None:
    measured, records = run([MLP])
    assert measured is not None
    assert records is not None
    assert [(r.op, r.metric) for r in measured] == [("matmul", "TFLOP/s"), ("copy", "GB/s")]
    missing, *eager = records
    assert (missing.provider, missing.metric) == (OURS, "not run")
    assert "interpreted" in (missing.why or "")
    assert [record.metric for record in eager] == ["ms", "GB/s", "TFLOP/s", "max error", "mean error"]
    flops, traffic = cost("conv_mlp", MLP.shape, MLP.options, MLP.dtype)
    ms, gigabytes, teraflops, largest, mean = eager
    assert (ms.p20, ms.p50, ms.p80) == (1.0, 2.0, 4.0)
    assert (gigabytes.p20, gigabytes.p50, gigabytes.p80) == pytest.approx([traffic / s / 1e6 for s in (4, 2, 1)])
    assert teraflops.p50 == pytest.approx(flops / 2e-3 / 1e12)
    assert ms.roofline == pytest.approx(max(flops / 1e12, traffic / 1e9) / 2e-3)
    assert {record.evidence["options"]["hidden"] for record in records} == {16}
    assert ms.evidence["form"] == "eager"
    assert ms.evidence["within the rule"]
    case = draw(MLP, CPU)
    exact = case.exact()
    assert largest.p50 == pytest.approx(((case.run("eager") - exact).abs().max() / exact.abs().max()).item())
    assert 0 < mean.p50 < largest.p50
    for record in records:  # as lines of a file
        assert json.loads(record.as_json())["op"] == "conv_mlp"
    table = "\n".join(kernels.lines(records))
    assert "conv_mlp         3x8x5x4          float32   eager                 2000.00" in table
    assert f"{largest.p50:.1e}" in table
    assert "not run: interpreted" in table
    assert "copy 1 GB/s" in kernels.lines(measured)[0]


def test_what_has_no_products_has_no_teraflops() -> None:
    _, records = run([POOL], PROVIDERS[1])
    assert [record.metric for record in records or ()] == ["ms", "GB/s", "max error", "mean error"]
    assert (records or ())[0].evidence["where"] == ["here", "there"]


def test_the_fastest_form_counts_and_faults_are_recorded() -> None:
    times = iter([3.0, 2.0])

    def timer(make: Callable[[], Callable[[], object]], device: torch.device, footprint: int) -> Timing:
        make()()
        return replace(Timing(1.0, 1.0, 9.0, 9.0, 5), p50=next(times))

    def raises(case: Case) -> Tensor:
        raise MemoryError("no room\nfor it")

    def off(case: Case) -> Tensor:
        return case.run("eager") * 1.01

    found = provider("some", lambda case: case.run("eager"), raises, off)
    poisoned = provider("poisoned", lambda case: case.run("eager") * math.nan)
    _, records = run([MLP], provider("broken", raises), poisoned, found, timer=timer)
    broken, nan, ms, *others = records or ()
    assert (broken.metric, broken.why) == ("not run", "form 0: MemoryError: no room")
    assert nan.metric == "not run", "speed is never recorded without an error to show"
    assert "480 NaN" in (nan.why or "")
    assert (ms.p50, ms.evidence["form"], ms.evidence["failed"]) == (
        2.0,
        "form 2",
        broken.why and ["form 1: MemoryError: no room"],
    )
    assert ms.evidence["within the rule"] is False
    assert next(record.p50 for record in others if record.metric == "max error") == pytest.approx(0.01, rel=1e-3)


def test_our_failures_are_told() -> None:
    def raises(case: Case) -> Tensor:
        raise RuntimeError("out of resource")

    def off(case: Case) -> Tensor:
        return case.run("eager") + 0.1

    def told(*who: Provider) -> list[str]:
        return kernels.failures(run([MLP], *who)[1] or ())

    assert told(*PROVIDERS[:2]) == []
    assert told(provider("eager", raises), provider("torch.compile", off)) == []
    assert told(provider(OURS, raises)) == ["conv_mlp 3x8x5x4 float32: form 0: RuntimeError: out of resource"]
    assert told(provider(OURS, off)) == ["conv_mlp 3x8x5x4 float32: inaccurate, see `effformer verify`"]


def test_a_lost_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured is kept, nobody is measured on what is left of the device, and the next call goes on."""
    monkeypatch.setattr(kernels._Cell, "_recovers", lambda self: broken == 0)
    broken = 0

    def breaks(case: Case) -> Tensor:
        nonlocal broken
        broken = 1
        raise RuntimeError("illegal memory access")

    found = []
    with pytest.raises(DeviceLostError, match="conv_mlp 3x8x5x4 float32: breaks broke the device"):
        found.extend(
            records
            for records in bench(
                [MLP, POOL], CPU, MACHINE, seconds=60.0, attempts=begun(MACHINE), timer=fake_timer,
                measure=fake_ceilings,
                providers=[PROVIDERS[1], provider("breaks", breaks), provider("later", lambda case: case.run("eager"))],
            )
            if records is not None and "options" in records[0].evidence
        )  # fmt: skip
    (records,) = found or [[]]
    assert [record.metric for record in records[-2:]] == ["not run", "not run"]
    assert "illegal memory access" in (records[-2].why or "")
    assert records[-1].why == "breaks had broken the device"
    assert records[0].metric == "ms"
    assert recorded_cells(records, MACHINE) == {key_of(MLP)}


def test_what_takes_the_process_with_it_is_left_out_the_third_time() -> None:
    class Crash(BaseException):
        pass

    def crashes(case: Case) -> Tensor:
        attempts.remove = lambda *what: None  # type: ignore[method-assign]  # a process that is gone takes nothing back
        raise Crash

    with_ = [PROVIDERS[1], provider("crashes", crashes)]
    for _ in range(2):
        attempts = begun(MACHINE)
        with pytest.raises(Crash):
            list(bench([MLP], CPU, MACHINE, seconds=60.0, attempts=attempts, providers=with_, timer=fake_timer,
                       measure=fake_ceilings))  # fmt: skip
    _, records = run([MLP], *with_)
    assert records is not None
    assert [record.why for record in records if record.metric == "not run"] == [
        "it was begun twice, and came to no end"
    ]
    assert records[0].provider == "eager"
    _, records = run([POOL], PROVIDERS[1], provider("crashes", lambda case: case.run("eager")))
    assert {record.provider for record in records or () if record.metric == "ms"} == {"eager", "crashes"}


def test_no_room_for_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(case: Case) -> Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(kernels, "exact_of", no_room)
    _, records = run([MLP])
    assert [record.metric for record in records or ()] == ["not run", "not run"]


def test_the_time_is_over() -> None:
    assert run([MLP, POOL], seconds=-1.0) == [None]
    assert run([], seconds=-1.0) == []


# --- order, resumption --------------------------------------------------------------------------------------------------


def test_order() -> None:
    names = ["efficientformer_l1", "efficientformer_l3"]
    found = cells(names, OPERATIONS, [torch.bfloat16, torch.float16], [8, 1, 64, 256])
    assert len({key_of(check) for check in found}) == len(found)
    groups = list(dict.fromkeys((check.dtype, check.where[0].split()[0], check.shape[0]) for check in found))
    l1, l3 = names
    bf16, fp16 = torch.bfloat16, torch.float16
    assert groups[:6] == [(bf16, l1, 256), (bf16, l1, 1), (bf16, l3, 256), (bf16, l3, 1), (bf16, l1, 8), (bf16, l1, 64)]
    assert groups[8] == (fp16, l1, 256)
    shared = [check for check in found if check.operation == "bias_attention" and check.dtype == bf16]
    assert len(shared) == 4, "once for both networks"
    assert shared[0].where == ("efficientformer_l1 stage 4", "efficientformer_l3 stage 4")
    assert "network" not in {check.operation for check in cells(list_models(), OPERATIONS, [bf16], [1])}


def test_resumption(monkeypatch: pytest.MonkeyPatch) -> None:
    _, records = run([MLP])
    assert records is not None
    later = replace(MACHINE, date="2026-02-02T00:00:00+00:00")
    assert recorded_cells(records, later) == {key_of(MLP)}
    assert recorded_cells(records, replace(later, commit="of results alone")) == {key_of(MLP)}
    for name in ("gpu", "torch", "triton"):
        assert recorded_cells(records, replace(MACHINE, **{name: "other"})) == set()
    monkeypatch.setattr(kernels, "code", lambda: "changed")
    assert recorded_cells(records, MACHINE) == set()
    assert key_of(replace(MLP, options={"hidden": 32})) != key_of(MLP)


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Twice: the first call's time is over after one cell, the second one takes the rest."""
    monkeypatch.setattr(kernels, "cells", lambda *arguments: cells(*arguments, size=(32, 32)))
    allowed = 1

    def some(todo: list[Check], *arguments: Any, **options: Any) -> Any:
        yield from bench(todo[:allowed], *arguments, **options, providers=PROVIDERS[:2], timer=fake_timer, measure=fake_ceilings)  # fmt: skip
        if allowed < len(todo):
            yield None

    monkeypatch.setattr(kernels, "bench", some)
    call = ["bench", "kernels", "--op", "pool_mixer", "--device", "cpu", "--output", str(tmp_path)]
    assert main(call) == os.EX_TEMPFAIL
    out = capsys.readouterr().out
    assert "CPU run: says nothing about a GPU" in out
    assert "4 of 4 cells" in out
    assert "the same command goes on" in out
    path = tmp_path / "cpu" / "kernels.jsonl"
    assert len({record.shape for record in read_records(path) if record.metric == "ms"}) == 1
    allowed = 9
    assert main(call) == 0
    assert "3 of 4 cells" in capsys.readouterr().out
    shapes = [record.shape for record in read_records(path) if record.metric == "ms"]
    assert shapes == [(1, 48, 8, 8), (1, 96, 4, 4), (1, 224, 2, 2), (1, 448, 1, 1)]
    assert main(call) == 0
    assert "0 of 4 cells" in capsys.readouterr().out
    assert [record.shape for record in read_records(path) if record.metric == "ms"] == shapes
    monkeypatch.setattr(kernels, "failures", lambda records: ["meta4d: wrong"])
    assert main([*call, "--batch-size", "2"]) == 1
    assert "FAIL meta4d: wrong" in capsys.readouterr().err


# --- ceilings -----------------------------------------------------------------------------------------------------------


def test_ceilings() -> None:
    seen = []

    def timer(make: Callable[[], Callable[[], object]], device: torch.device, footprint: int) -> Timing:
        result = make()()
        assert isinstance(result, Tensor)
        assert result.float().std() > 0.5, "zeros are multiplied faster than what a network computes"
        seen.append((result.dtype, tuple(result.shape), footprint))
        return Timing(1.0, 2.0, 4.0, 5.0, 9)

    found = measure_ceilings(CPU, torch.float16, side=32, copied=2**16, timer=timer)
    assert seen == [(torch.float16, (32, 32), 3 * 32 * 32 * 2), (torch.float16, (2**15,), 2**17)]
    assert found.ceilings.flops == pytest.approx(2 * 32**3 / 2e-3)
    assert found.ceilings.bandwidth == pytest.approx(2 * 2**16 / 2e-3)
    product, copy = found.records(MACHINE)
    assert (product.op, product.shape, product.metric) == ("matmul", (32, 32, 32), "TFLOP/s")
    assert product.p50 == pytest.approx(found.ceilings.flops / 1e12)
    assert (copy.op, copy.shape, copy.metric) == ("copy", (2**15,), "GB/s")
    assert (copy.p20, copy.p50, copy.p80) == pytest.approx([2**17 / s / 1e6 for s in (4, 2, 1)])


def test_ceilings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "CPU_SIDE", 64)
    monkeypatch.setattr(ceilings, "CPU_BYTES", 2**16)
    monkeypatch.setattr("effformer.bench.measure.timing.CPU_CACHE", 2**16)
    found = measure_ceilings(CPU, torch.float32)
    assert (found.side, found.copied) == (64, 2**16)
    assert found.ceilings.flops > 1e6
    assert found.ceilings.bandwidth > 1e6
