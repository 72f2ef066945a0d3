"""The benchmark of the operations on a CPU, small, with fake clocks: records, order, resumption, ceilings."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from effformer.bench.measure import ceilings, operations, resume
from effformer.bench.measure.ceilings import CeilingTimes, measure_ceilings
from effformer.bench.measure.operation_providers import OURS, PROVIDERS, OperationProvider
from effformer.bench.measure.operations import begun, in_order, is_complete, key_of, measure_operations
from effformer.bench.measure.records import Machine, Record, read_records
from effformer.bench.measure.resume import DeviceLostError, ResultsFile
from effformer.bench.measure.roofline import cost
from effformer.bench.measure.timing import Timing
from effformer.bench.report.comparison import compare
from effformer.bench.report.tables import as_text, error
from measurements import MLP, POOL
from torch import Tensor

from effformer import list_models
from effformer.apps.verify import draw
from effformer.apps.verify_report import Check
from effformer.cli import main
from effformer.testing import Case
from effformer.workload import OPERATIONS

pytestmark = pytest.mark.usefixtures("uncompiled")
CPU = torch.device("cpu")
MACHINE = Machine("cpu: test", "none", "2.13", "3.7", "1", "code", "abc", "2026-01-01T00:00:00+00:00")


# --- records ----------------------------------------------------------------------------------------------------------


def fake_ceilings(device: torch.device, dtype: torch.dtype) -> CeilingTimes:
    """1 TFLOP/s, and 1 GB/s."""
    timing = Timing(1.0, 1.0, 1.0, 1.0, 5)
    return CeilingTimes(dtype, 1, replace(timing, p50=2e-9), 500_000, timing)


def fake_timer(make: Callable[[], Callable[[], object]], device: torch.device, footprint: int) -> Timing:
    assert make()() is not None
    return Timing(1.0, 2.0, 4.0, 5.0, 7)


@pytest.fixture
def file(tmp_path: Path) -> ResultsFile:
    return ResultsFile(tmp_path / "kernels.jsonl", MACHINE, time.monotonic() + 60)


def run(file: ResultsFile, todo: list[Check], *with_: OperationProvider, **options: Any) -> list[list[Record]]:
    options = {"timer": fake_timer, "measure": fake_ceilings} | options
    return list(measure_operations(todo, file, CPU, providers=with_ or PROVIDERS[:2], **options))


def provider(name: str, *calls: Callable[[Case], Tensor]) -> OperationProvider:
    """With a form for each of `calls`."""
    return OperationProvider(
        name, lambda device: {f"form {n}": lambda case, c=c: lambda: c(case) for n, c in enumerate(calls)}
    )


def eager(case: Case) -> Tensor:
    return case.run("eager")


def test_records_of_an_operation(file: ResultsFile) -> None:
    (records,) = run(file, [MLP])
    assert [(r.op, r.metric) for r in read_records(file.path)[:2]] == [("matmul", "TFLOP/s"), ("copy", "GB/s")]
    found = {record.metric: record for record in records}
    missing = found.pop("not run")
    assert missing.provider == OURS
    assert "interpreted" in (missing.why or "")
    assert set(found) == {"ms", "GB/s", "TFLOP/s", "max error", "mean error"}
    flops, traffic = cost("conv_mlp", MLP.shape, MLP.options, MLP.dtype)
    ms, gigabytes, teraflops = found["ms"], found["GB/s"], found["TFLOP/s"]
    assert (ms.p20, ms.p50, ms.p80) == (1.0, 2.0, 4.0)
    assert (gigabytes.p20, gigabytes.p50, gigabytes.p80) == pytest.approx([traffic / s / 1e6 for s in (4, 2, 1)])
    assert teraflops.p50 == pytest.approx(flops / 2e-3 / 1e12)
    assert ms.roofline == pytest.approx(max(flops / 1e12, traffic / 1e9) / 2e-3)
    assert {record.details["options"]["hidden"] for record in records} == {16}
    assert {record.key for record in records} == {key_of(MLP)}
    assert ms.details["form"] == "eager"
    assert ms.details["within the rule"]
    case = draw(MLP, CPU)
    exact = case.exact()
    largest = ((case.run("eager") - exact).abs().max() / exact.abs().max()).item()
    assert found["max error"].p50 == pytest.approx(largest)
    assert 0 < found["mean error"].p50 < largest
    for record in records:  # as lines of a file
        assert json.loads(record.as_json())["op"] == "conv_mlp"
    text = as_text(*compare(records))
    assert text.startswith("conv_mlp, 3x8x5x4, float32, hidden 16\n| provider ")
    assert "| 2,000 (1,000 to 4,000) |" in text
    assert f"| {error(largest)} " in text
    assert "| not run " in text


def test_what_has_no_products_has_no_teraflops(file: ResultsFile) -> None:
    (records,) = run(file, [POOL], PROVIDERS[1])
    assert {record.metric for record in records} == {"ms", "GB/s", "max error", "mean error"}
    assert records[0].details["where"] == ["here", "there"]


def test_the_fastest_form_counts_and_faults_are_recorded(file: ResultsFile) -> None:
    times = iter([3.0, 2.0])

    def timer(make: Callable[[], Callable[[], object]], device: torch.device, footprint: int) -> Timing:
        make()()
        return replace(Timing(1.0, 1.0, 9.0, 9.0, 5), p50=next(times))

    def raises(case: Case) -> Tensor:
        raise MemoryError("no room\nfor it")

    def off(case: Case) -> Tensor:
        return case.run("eager") * 1.01

    found = provider("some", eager, raises, off)
    poisoned = provider("poisoned", lambda case: case.run("eager") * math.nan)
    (records,) = run(file, [MLP], provider("broken", raises), poisoned, found, timer=timer)
    by_provider = {(record.provider, record.metric): record for record in records}
    assert by_provider["broken", "not run"].why == "form 0: MemoryError: no room"
    assert "480 NaN" in (by_provider["poisoned", "not run"].why or ""), "no speed without an error to show"
    ms = by_provider["some", "ms"]
    assert (ms.p50, ms.details["form"], ms.details["failed"]) == (2.0, "form 2", ["form 1: MemoryError: no room"])
    assert ms.details["within the rule"] is False
    assert by_provider["some", "max error"].p50 == pytest.approx(0.01, rel=1e-3)


def test_our_failures_are_told(tmp_path: Path) -> None:
    def raises(case: Case) -> Tensor:
        raise RuntimeError("out of resource")

    def off(case: Case) -> Tensor:
        return case.run("eager") + 0.1

    def told(name: str, *who: OperationProvider) -> list[str]:
        (records,) = run(ResultsFile(tmp_path / name, MACHINE), [MLP], *who)
        return resume.failures(records)

    assert told("none", *PROVIDERS[:2]) == []
    assert told("others", provider("eager", raises), provider("torch.compile", off)) == []
    assert told("ours", provider(OURS, raises)) == [
        "conv_mlp 3x8x5x4 float32, ours: form 0: RuntimeError: out of resource"
    ]
    assert told("error", provider(OURS, off)) == ["conv_mlp 3x8x5x4 float32, ours: inaccurate, see `effformer verify`"]


def test_a_lost_device(file: ResultsFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """All results are kept, nothing is measured on the rest of the device, and the next call goes on."""
    monkeypatch.setattr(operations, "recovers", lambda device: broken == 0)
    broken = 0

    def breaks(case: Case) -> Tensor:
        nonlocal broken
        broken = 1
        raise RuntimeError("illegal memory access")

    with_ = [PROVIDERS[1], provider("breaks", breaks), provider("later", eager)]
    with pytest.raises(DeviceLostError, match="breaks broke the device"):
        run(file, [MLP, POOL], *with_)
    assert file.providers(key_of(MLP)) == {"eager", "breaks"}
    assert file.providers(key_of(POOL)) == set()
    (lost,) = [record for record in file.records(key_of(MLP)) if record.metric == "not run"]
    assert "illegal memory access" in (lost.why or "")
    broken = 0
    first, second = run(ResultsFile(file.path, MACHINE), [MLP, POOL], with_[0], with_[2])
    assert {record.provider for record in first} == {"eager", "breaks", "later"}
    assert {record.provider for record in second} == {"eager", "later"}


def test_what_takes_the_process_with_it_is_left_out_the_third_time(file: ResultsFile) -> None:
    with_ = [PROVIDERS[1], provider("crashes", eager)]
    for _ in range(2):  # a process that is gone writes no more
        file.add([begun(MLP, "crashes", MACHINE)])
    (records,) = run(file, [MLP], *with_)
    assert [record.why for record in records if record.metric == "not run"] == [
        "it was started 2 times, and took too long or broke the process"
    ]
    (records,) = run(file, [POOL], *with_)
    assert {record.provider for record in records if record.metric == "ms"} == {"eager", "crashes"}


def test_no_room_for_the_reference(file: ResultsFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(case: Case) -> Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(operations, "exact_of", no_room)
    (records,) = run(file, [MLP])
    assert [record.metric for record in records] == ["not run", "not run"]


def test_the_time_is_over(file: ResultsFile) -> None:
    """No provider is started then; the one under way is not stopped."""

    def slow(case: Case) -> Tensor:
        file.deadline = 0.0
        return case.run("eager")

    (records,) = run(file, [MLP, POOL], provider("slow", slow), provider("next", eager))
    assert {record.provider for record in records} == {"slow"}
    assert run(file, [MLP, POOL]) == []
    assert run(file, []) == []


# --- order, resumption ------------------------------------------------------------------------------------------------


def test_order() -> None:
    names = ["efficientformer_l1", "efficientformer_l3"]
    found = in_order(names, OPERATIONS, [torch.bfloat16, torch.float16], [8, 1, 64, 256])
    assert len({key_of(check) for check in found}) == len(found)
    groups = list(dict.fromkeys((check.dtype, check.where[0].split()[0], check.shape[0]) for check in found))
    l1, l3 = names
    bf16, fp16 = torch.bfloat16, torch.float16
    assert groups[:6] == [(bf16, l1, 256), (bf16, l1, 1), (bf16, l3, 256), (bf16, l3, 1), (bf16, l1, 8), (bf16, l1, 64)]
    assert groups[8] == (fp16, l1, 256)
    shared = [check for check in found if check.operation == "bias_attention" and check.dtype == bf16]
    assert len(shared) == 4, "once for both networks"
    assert shared[0].where == ("efficientformer_l1 stage 4", "efficientformer_l3 stage 4")
    assert "network" not in {check.operation for check in in_order(list_models(), OPERATIONS, [bf16], [1])}


def test_resumption(file: ResultsFile) -> None:
    """Inside a measurement, too: the next call measures the providers that have no result."""

    def stops(case: Case) -> Tensor:
        raise KeyboardInterrupt

    def goes_on(machine: Machine) -> bool:
        return is_complete(MLP, ResultsFile(file.path, machine), both)

    both = [PROVIDERS[1], provider("second", eager)]
    with pytest.raises(KeyboardInterrupt):
        run(file, [MLP], both[0], provider("second", stops))
    before = file.path.read_text()
    assert file.providers(key_of(MLP)) == {"eager"}
    later = replace(MACHINE, date="2026-02-02T00:00:00+00:00", commit="of results alone")
    assert not goes_on(later)
    (records,) = run(ResultsFile(file.path, later), [MLP], *both)
    assert {record.provider for record in records} == {"eager", "second"}
    added = [json.loads(line) for line in file.path.read_text().removeprefix(before).splitlines()]
    assert {record["provider"] for record in added} == {"torch", "second"}, "eager is not measured again"
    assert goes_on(later)
    for name in ("gpu", "driver", "torch", "triton", "timm", "sources"):
        assert not goes_on(replace(MACHINE, **{name: "other"})), name
    assert key_of(replace(MLP, options={"hidden": 32})) != key_of(MLP)


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Twice: the first call's time is over after one measurement, the second one takes the rest."""
    monkeypatch.setattr(operations, "in_order", lambda *arguments: in_order(*arguments, size=(32, 32)))
    left = 1

    def timer(*arguments: Any) -> Timing:
        nonlocal left
        left -= 1
        return fake_timer(*arguments)

    def some(todo: list[Check], file: ResultsFile, device: torch.device, **options: Any) -> Any:
        for records in measure_operations(todo, file, device, timer=timer, measure=fake_ceilings, **options):
            yield records
            if left <= 0:
                file.deadline = 0.0

    monkeypatch.setattr(operations, "measure_operations", some)
    call = ["bench", "kernels", "--op", "pool_mixer", "--device", "cpu", "--output", str(tmp_path)]
    assert main(call) == os.EX_TEMPFAIL
    out = capsys.readouterr().out
    assert "CPU run: it says nothing about a GPU" in out
    assert "0 of 4 measurements are complete already" in out
    assert "3 of 4 measurements remain (pool_mixer 1x96x4x4 float32; " in out
    assert "the same command goes on" in out
    path = tmp_path / "cpu" / "kernels.jsonl"
    assert len({record.shape for record in read_records(path) if record.metric == "ms"}) == 1
    left = 9
    assert main(call) == 0
    assert "1 of 4 measurements are complete" in capsys.readouterr().out
    shapes = [r.shape for r in read_records(path) if (r.provider, r.metric) == ("eager", "ms")]
    assert shapes == [(1, 48, 8, 8), (1, 96, 4, 4), (1, 224, 2, 2), (1, 448, 1, 1)]
    assert main([*call, "--json"]) == 0
    captured = capsys.readouterr()
    assert "4 of 4 measurements" in captured.err
    found = [json.loads(line) for line in captured.out.splitlines()]
    assert [tuple(r["shape"]) for r in found if (r["provider"], r["metric"]) == ("eager", "ms")] == shapes
    assert [r.shape for r in read_records(path) if (r.provider, r.metric) == ("eager", "ms")] == shapes
    monkeypatch.setattr(resume, "failures", lambda records: ["meta4d: wrong"])
    assert main([*call, "--batch-size", "2"]) == 1
    assert "FAIL meta4d: wrong" in capsys.readouterr().err


# --- ceilings ---------------------------------------------------------------------------------------------------------


def test_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "CPU_SIDE", 32)
    monkeypatch.setattr(ceilings, "CPU_BYTES", 2**16)
    seen = []

    def timer(make: Callable[[], Callable[[], object]], device: torch.device, footprint: int) -> Timing:
        result = make()()
        assert isinstance(result, Tensor)
        assert result.float().std() > 0.5, "zeros are multiplied faster than what a network computes"
        seen.append((result.dtype, tuple(result.shape), footprint))
        return Timing(1.0, 2.0, 4.0, 5.0, 9)

    found = measure_ceilings(CPU, torch.float16, timer=timer)
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
