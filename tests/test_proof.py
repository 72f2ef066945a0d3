"""`make prove`: its checks and their order, sampling of large grids, and records that the next run goes on from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from compiling import TESTS, needs_compiler, run
from effformer.bench.offline import proof, prove
from effformer.bench.offline.proof import Record, Task, part, tasks
from effformer.bench.offline.ptx.program import parse
from effformer.bench.offline.ptx.trace import NotTraceableError, sliced
from effformer.bench.offline.sampling import first_middle_last

L1 = ["efficientformer_l1"]


def recorded(task: Task, **changes: object) -> Record:
    kernels = [{"kernel": "a_kernel", "configuration": {}, "grid": 9, "programs": 3, "faults": []}]
    errors = {"max_error": 0.5, "mean_error": 0.1, "eager_max_error": 0.4, "eager_mean_error": 0.1, "ulp": 0.1}
    record = Record.of(task, kernels=kernels, elements=7, **errors, ratio=1.25, passes=True, error=None, seconds=1.0)
    return replace(record, **changes)  # type: ignore[arg-type]


def test_the_order_of_checks() -> None:
    """bfloat16 before others, L1 first, large batches first; each check once; then odd, unaligned, unordered, large."""
    found = list(tasks([*L1, "efficientformer_l3"], [256, 1], [torch.bfloat16, torch.float16], [90, 80]))
    assert len({task.key for task in found}) == len(found)
    dtypes = [task.check.dtype for task in found]
    assert dtypes == sorted(dtypes, key=[torch.bfloat16, torch.float16].index)
    first = [task for task in found if task.check.dtype == torch.bfloat16]
    kinds = [task.kind for task in first]
    assert kinds == sorted(kinds, key=["network", "odd", "unaligned", "unordered", "large"].index)
    networks = [task for task in first if task.kind == "network"]
    batches = [task.check.shape[0] for task in networks if "efficientformer_l1" in " ".join(task.check.where)]
    assert batches == sorted(batches, reverse=True)
    assert [task.capability for task in found[:4]] == [90, 80, 90, 80]
    large = [task.check.shape for task in first if task.kind == "large"]
    assert large
    assert all(torch.Size(shape).numel() > 2**31 for shape in large)


def test_going_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A run leaves out what is recorded for these kernels and this Triton; it stops at the time limit with 75."""
    output, ran = tmp_path / "executed.jsonl", list[Task]()
    budget = 3

    def some(todo: Iterable[Task], workers: int, deadline: float) -> Iterator[Record]:
        for task, _ in zip(todo, range(budget), strict=False):
            ran.append(task)
            yield recorded(task)

    monkeypatch.setattr(prove, "prove", some)
    command = ["--models", *L1, "--operations", "pool_mixer", "--targets", "90", "--dtypes", "bfloat16", "--batches",
               "8", "--output", str(output)]  # fmt: skip
    assert prove.main(command) == os.EX_TEMPFAIL
    assert len(output.read_text().splitlines()) == 3
    budget = 100
    assert prove.main(command) == 0
    assert len({task.key for task in ran}) == len(ran) == 7  # four widths, odd, unaligned, large
    assert "7 of 7 checks done, 0 failed" in capsys.readouterr().out
    assert prove.main(command) == 0
    assert len(ran) == 7
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    lines[0]["source"] = "other kernels"
    lines[1]["triton"] = "3.0.0"
    output.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert prove.main(command) == 0
    assert len(ran) == 9


@pytest.mark.parametrize("change", [{"passes": False}, {"error": "ValueError: no", "passes": False}])
def test_failures(change: dict[str, object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                  capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    kernels = [{"kernel": "a_kernel", "configuration": {}, "grid": 9, "programs": 3, "faults": ["a race"]}]
    monkeypatch.setattr(prove, "prove", lambda todo, *_: (recorded(task, kernels=kernels, **change) for task in todo))
    command = ["--models", *L1, "--operations", "head", "--targets", "90", "--dtypes", "float16", "--batches", "1"]
    assert prove.main([*command, "--output", str(tmp_path / "file")]) == 1
    out = capsys.readouterr().out
    assert "FAIL sm_90" in out
    assert "a race" in out
    assert ("ValueError: no" in out) == ("error" in change)


def test_records_of_the_repository() -> None:
    """They are of known tasks, and all pass but two: docs/executed.md says which, and why."""
    lines = (TESTS.parent / "bench/results/executed.jsonl").read_text().splitlines()
    records = [Record(**json.loads(line)) for line in lines]
    assert len({record.key for record in records}) == len(records) > 500
    assert all(record.elements and not record.faults for record in records)
    failed = {(one.operation, *one.shape, one.dtype, one.target) for one in records if not one.passes}
    assert failed == {(name, 1, 448, 7, 7, "float32", "sm_100") for name in ("conv_mlp", "meta4d")}
    assert asdict(records[0]).keys() == json.loads(lines[0]).keys()


def test_the_digest_of_code(tmp_path: Path) -> None:
    """Comments and docstrings may change without a new proof; a constant may not."""
    file = tmp_path / "module.py"
    file.write_text('"""One."""\n\ndef f(x):\n    """Two."""\n    return x + 1\n')
    code = proof._code(file)
    file.write_text('"""Other."""\n# why\ndef f(x):\n    """More."""\n    return x + 1\n')
    assert proof._code(file) == code
    file.write_text('"""Other."""\n\ndef f(x):\n    """More."""\n    return x + 2\n')
    assert proof._code(file) != code


def test_tasks_and_records_have_one_key(tmp_path: Path) -> None:
    """Also once they were written, where tuples become lists."""
    (task, *_) = part([90])
    prove.write_records(tmp_path / "file", [recorded(task)])
    (record,) = prove.read_records(tmp_path / "file")
    assert record.key == task.key


# --- sampling ---------------------------------------------------------------------------------------------------------


@needs_compiler
def test_samples() -> None:
    """The sampled programs of operations of several kernels give the bits that whole grids give."""
    for found in json.loads(run(str(TESTS / "sampling_worker.py"))):
        assert not found["faults"], found
        assert found["same"], found
        assert found["last"], found
        assert found["all"], found
        assert 0 < found["written"] < found["elements"], found
        assert found["programs"][-1] == 3 < found["grids"][-1], found
        assert sum(found["programs"]) < 0.7 * sum(found["grids"]), found


def test_first_middle_last() -> None:
    assert [first_middle_last(grid) for grid in (1, 2, 3, 100)] == [[0], [0, 1], [0, 1, 2], [0, 50, 99]]


SHARED = """
.version 8.0
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(.param .u64 kernel_param_0)
.reqntid 32
{
.reg .b32 %r<4>;
.reg .b64 %rd<4>;
ld.param.u64 %rd1, [kernel_param_0];
ld.shared.b32 %r1, [global_smem];
INDEX
mul.wide.u32 %rd2, %r2, 4;
add.s64 %rd3, %rd1, %rd2;
st.global.b32 [%rd3], %r1;
ret;
}
"""


def test_what_cannot_be_traced() -> None:
    """An address that comes from shared memory; a value that does is left out."""
    with pytest.raises(NotTraceableError, match="ld.shared"):
        sliced(parse(SHARED.replace("INDEX", "mov.b32 %r2, %r1;")))
    kept = sliced(parse(SHARED.replace("INDEX", "mov.u32 %r2, %tid.x;")))
    names = [one.name for one in kept.instructions]
    assert names == ["ld.param.u64", "mov.u32", "mul.wide.u32", "add.s64", "trace.write.4", "ret"]
