"""`make prove`: its checks and their order, sampling of large grids, and records that the next run goes on from."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from compiling import TESTS, needs_compiler, run
from effformer.bench.offline import digest, proof, prove
from effformer.bench.offline.proof import Record, Task, part, tasks
from effformer.bench.offline.ptx.program import parse
from effformer.bench.offline.ptx.slices import NotTraceableError, sliced
from effformer.bench.offline.sampling import first_middle_last
from effformer.kernels.tiling.choose import Question
from effformer.kernels.tiling.device import TARGETS

from effformer.apps.verify_report import NETWORK
from effformer.workload import OPERATIONS

L1 = ["efficientformer_l1"]


def recorded(task: Task, **changes: object) -> Record:
    kernels = [{"kernel": "a_kernel", "configuration": {}, "grid": 9, "programs": 3, "faults": []}]
    errors = {"max_error": 0.5, "mean_error": 0.1, "eager_max_error": 0.4, "eager_mean_error": 0.1, "ulp": 0.1}
    more = {"ratio": 1.25, "passes": True, "error": None, "seconds": 1.0, "tiles": []}
    record = Record.of(task, kernels=kernels, elements=7, **errors, **more)
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
    """Each task has one, and all pass."""
    lines = (TESTS.parent / "bench/results/executed.jsonl").read_text().splitlines()
    records = [Record(**json.loads(line)) for line in lines]
    assert len({record.key for record in records}) == len(records) > 500
    assert all(record.elements and not record.faults for record in records)
    assert [record for record in records if not record.passes] == []
    assert asdict(records[0]).keys() == json.loads(lines[0]).keys()


def test_records_are_of_the_present_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another answer of the table makes a record old, and so does another digest of its operation."""
    task = next(iter(tasks(L1, [8], [torch.bfloat16], [90], ["pool_mixer"])))
    questions = [Question("pool_mixer", torch.bfloat16, (48, 1, 25088)), Question("linear", torch.float32, (8, 9, 3))]
    record = recorded(task, tiles=proof.tiles_of(questions, TARGETS[90]))
    again = Record(**json.loads(json.dumps(asdict(record))))
    assert again.is_current
    assert not replace(again, triton="3.0.0").is_current
    changed = copy.deepcopy(again.tiles)
    changed[1]["use"]["num_warps"] *= 2
    assert not replace(again, tiles=changed).is_current
    monkeypatch.setattr(proof, "source", lambda operation: f"other code of {operation}")
    assert not again.is_current


def test_the_digest_of_an_operation() -> None:
    """It reaches the kernels and helpers of the operation, its reference, and the machine, but no other operation."""
    digests = {name: proof.source(name) for name in (*OPERATIONS, NETWORK)}
    assert len(set(digests.values())) == len(digests)
    start = [("effformer.kernels.conv_mlp", "conv_mlp"), ("effformer.reference", "conv_mlp")]
    found = {name for _, name in digest.reached(start, (*proof._LEFT_OUT, *proof._OF_NETWORKS))}
    assert {
        "mlp_kernel",
        "add_hidden",
        "split_mlp_kernel",
        "linear_kernel",
        "locate",
        "EXP3",
        "Launch",
        "_affine",
    } <= found
    assert not {"conv_norm_kernel", "bias_attention_kernel", "layer_norm_kernel", "head", "answer"} & found


CODE = {
    "one.py": """
'''A module.'''
import math
from . import three
from .two import SIZE as size, helper

UNUSED = 1
LIMIT = size + 1

def used(x):
    '''What it does.'''
    return helper(x) + three.third(LIMIT)

def other(three):
    from .two import late
    return late, three

def passed_on():
    return print(three)
""",
    "two.py": """
from .three import third as helper
SIZE = 3
if SIZE:
    def late(): return math.pi
class Unused: pass
""",
    "three.py": "def third(x): return x\ndef fourth(): pass\n",
}


def test_what_a_definition_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of its module, imported ones, attributes of modules, imports within functions; comments do not count."""

    def reached(name: str, changes: dict[str, tuple[str, str]] | None = None) -> dict[tuple[str, str], str]:
        for file, text in CODE.items():
            old, new = (changes or {}).get(file, ("", ""))
            assert old in text
            (tmp_path / "pack" / file).write_text(text.replace(old, new, 1) if old else text)
        digest._module.cache_clear()
        return digest.reached([("pack.one", name)])

    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(digest, "PACKAGE", "pack")
    digest._exists.cache_clear()
    first = reached("used")
    assert set(first) == {("pack.one", "used"), ("pack.one", "LIMIT"), ("pack.two", "SIZE"), ("pack.three", "third")}
    assert set(reached("other")) == {("pack.one", "other"), ("pack.two", "late")}
    assert set(reached("passed_on")) == {("pack.one", "passed_on"), ("pack.three", "third"), ("pack.three", "fourth")}
    stopped = digest.reached([("pack.one", "used")], {("pack.two", "SIZE"), ("pack.three", "*")})
    assert set(stopped) == {("pack.one", "used"), ("pack.one", "LIMIT")}
    assert reached("used", {"one.py": ("What it does", "Else")}) == first
    assert reached("used", {"one.py": ("UNUSED = 1", "UNUSED = 2")}) == first
    assert reached("used", {"two.py": ("SIZE = 3", "SIZE = 3  # a remark")}) == first
    assert reached("used", {"two.py": ("SIZE = 3", "SIZE = 4")}) != first
    assert reached("used", {"one.py": ("    '''What it does.'''\n", "")}) == first
    assert reached("used", {"one.py": ("    '''What it does.'''\n", "    pass\n")}) != first
    assert reached("other", {"two.py": ("math.pi", "math.tau")}) != reached("other")
    assert reached("used", {"three.py": ("return x", "return -x")}) != first
    with pytest.raises(LookupError, match="'missing'"):
        digest.reached([("pack.one", "missing")])
    digest._module.cache_clear()
    digest._exists.cache_clear()


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


FLOW = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry kernel(.param .u64 kernel_param_0, .param .u32 kernel_param_1)
.reqntid 32
{
.reg .pred %p<4>;
.reg .b32 %r<8>;
.reg .b64 %rd<4>;
ld.param.u64 %rd1, [kernel_param_0];
ld.param.u32 %r5, [kernel_param_1];
mov.u32 %r1, %tid.x;
mov.b32 %r2, 0;
LOOP:
ld.global.b32 %r3, [%rd1];
tanh.approx.f32 %r4, %r3;
setp.gt.f32 %p1, %r4, 0f00000000;
@%p1 bra LARGE;
sqrt.approx.f32 %r4, %r4;
bra JOIN;
LARGE:
SHARED
JOIN:
add.u32 %r2, %r2, 1;
setp.lt.u32 %p2, %r2, %r5;
@%p2 bra LOOP;
st.global.b32 [%rd1], %r4;
ret;
}
"""


def test_branches_that_no_access_depends_on() -> None:
    """Those of a loop with an access stay; one between two ways to compute a value goes where the ways meet."""
    found = sliced(parse(FLOW.replace("SHARED", "ex2.approx.f32 %r4, %r4;")))
    text = [" ".join([one.name, *one.operands[-1:]]) for one in found.instructions]
    assert [one for one in text if one.startswith(("trace", "bra", "setp"))] == [
        "trace.read.4 [%rd1]", "bra $meeting7", "bra JOIN", "setp.lt.u32 %r5", "bra LOOP", "trace.write.4 [%rd1]",
    ]  # fmt: skip
    assert found.instructions[found.labels["$meeting7"]].name == "add.u32"
    assert found.instructions[found.labels["LOOP"]].name == "trace.read.4"
    with pytest.raises(NotTraceableError, match="tanh.approx"):  # an access on one of the ways
        sliced(parse(FLOW.replace("SHARED", "st.global.b32 [%rd1], %r4;").replace("sqrt.approx.f32", "neg.f32")))
