"""Dynamic counts: of hand-written PTX by known numbers, the bounds that follow, and the records for the pinned Triton."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import compiling
import numpy as np
import pytest
import triton
from effformer.bench.offline import counted
from effformer.bench.offline.bounds import GPUS, bound, bounds, gpus_of, programs_that_fit, waves
from effformer.bench.offline.counted import Record, grown, read_records, sample, write_records
from effformer.bench.offline.ptx.machine import Options
from ptx_memory_runs import kernel
from ptx_runs import run

from effformer.cli import main
from effformer.commands import bench_counts

RECORDS = compiling.TESTS.parent / counted.FILE
PINNED = re.search(r"^triton==(.+)$", (compiling.TESTS.parent / "constraints.txt").read_text(), re.MULTILINE)


def counts(body: str, threads: int = 32) -> dict[str, float]:
    """Of a kernel whose %g0 is an input, and %g1 an output, of 64 KiB each, with as much shared memory."""
    ptx = kernel(body, pointers=2, threads=threads, target="sm_100a")
    given = np.zeros(1 << 14, np.uint32)
    options = Options(watch=False, count=True)
    ran = run(ptx, given, outputs=[((1 << 14,), np.uint32)], shared_memory=1 << 16, options=options)
    assert not ran.faults, list(map(str, ran.faults))
    return ran.counts


@pytest.mark.parametrize(
    ("body", "sectors", "ideal"),
    [
        ("mad.wide.u32 %rd1, %t, 4, %g0; ld.global.b32 %r1, [%rd1];", 4, 4),  # side by side
        ("mad.wide.u32 %rd1, %t, 16, %g0; ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1];", 16, 16),
        ("mad.wide.u32 %rd1, %t, 32, %g0; ld.global.v8.b32 {%r1, %r2, %r3, %r4, %r5, %r6, %r7, %r8}, [%rd1];", 32, 32),
        ("mad.wide.u32 %rd1, %t, 2, %g0; ld.global.b16 %h1, [%rd1];", 2, 2),
        ("mad.wide.u32 %rd1, %t, 4, %g0; ld.global.b16 %h1, [%rd1];", 4, 2),  # every other element
        ("mad.wide.u32 %rd1, %t, 128, %g0; ld.global.b32 %r1, [%rd1];", 32, 4),  # of different lines
        ("ld.global.b32 %r1, [%g0];", 1, 1),  # one place for all lanes
        ("mad.wide.u32 %rd1, %t, 4, %g0; ld.global.b32 %r1, [%rd1]; ld.global.b32 %r2, [%rd1];", 8, 8),  # repeated
        ("mad.wide.u32 %rd1, %t, 4, %g0; ld.global.b32 %r1, [%rd1+16];", 5, 4),  # at half a sector
        ("setp.lt.u32 %p1, %t, 9; mad.wide.u32 %rd1, %t, 4, %g0; @%p1 ld.global.b32 %r1, [%rd1];", 2, 2),
        ("mad.lo.u32 %r1, %t, 16, %smem; mad.wide.u32 %rd1, %t, 16, %g0; "
         "cp.async.cg.shared.global [%r1], [%rd1], 16; cp.async.wait_all;", 16, 16),
    ],
)  # fmt: skip
def test_sectors_read(body: str, sectors: int, ideal: int) -> None:
    found = counts(body)
    assert (found["sectors_read"], found["ideal_sectors_read"], found["sectors_written"]) == (sectors, ideal, 0)
    found = counts(body.replace("%t,", "%lane,"), threads=128)  # each warp by itself
    assert (found["sectors_read"], found["ideal_sectors_read"]) == (4 * sectors, 4 * ideal)


def test_sectors_written() -> None:
    found = counts("mad.wide.u32 %rd1, %t, 8, %g1; st.global.b32 [%rd1], %t; red.global.add.f32 [%rd1], %t;")
    assert (found["sectors_written"], found["ideal_sectors_written"], found["sectors_read"]) == (16, 8, 0)


@pytest.mark.parametrize(
    ("body", "wavefronts", "ideal"),
    [
        ("mad.lo.u32 %r1, %t, 4, %smem; ld.shared.b32 %r2, [%r1];", 1, 1),
        ("mad.lo.u32 %r1, %t, 4, %smem; st.shared.b32 [%r1], %t;", 1, 1),
        ("mad.lo.u32 %r1, %t, 8, %smem; ld.shared.b32 %r2, [%r1];", 2, 1),  # 2 lanes a bank
        ("mad.lo.u32 %r1, %t, 128, %smem; ld.shared.b32 %r2, [%r1];", 32, 1),  # 32 lanes a bank
        ("mad.lo.u32 %r1, %t, 132, %smem; ld.shared.b32 %r2, [%r1];", 1, 1),  # padded
        ("ld.shared.b32 %r2, [%smem];", 1, 1),  # one word for all
        ("mad.lo.u32 %r1, %t, 2, %smem; ld.shared.b16 %h1, [%r1];", 1, 1),  # 2 lanes a word
        ("mad.lo.u32 %r1, %t, 8, %smem; ld.shared.v2.b32 {%r2, %r3}, [%r1];", 2, 2),
        ("mad.lo.u32 %r1, %t, 16, %smem; ld.shared.v4.b32 {%r2, %r3, %r4, %r5}, [%r1];", 4, 4),
        ("mad.lo.u32 %r1, %t, 128, %smem; ld.shared.v4.b32 {%r2, %r3, %r4, %r5}, [%r1];", 32, 4),
        ("mad.lo.u32 %r1, %t, 16, %smem; ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r2, %r3, %r4, %r5}, [%r1];", 4, 4),
        ("mad.lo.u32 %r1, %t, 64, %smem; ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r2, %r3, %r4, %r5}, [%r1];", 16, 4),
        ("mad.lo.u32 %r1, %t, 16, %smem; cp.async.cg.shared.global [%r1], [%g0], 16; cp.async.wait_all;", 4, 4),
    ],
)
def test_wavefronts(body: str, wavefronts: int, ideal: int) -> None:
    found = counts(body)
    assert (found["wavefronts"], found["ideal_wavefronts"]) == (wavefronts, ideal)


RECORD = Record(
    model="efficientformer_l1", part="stem, 2nd", operation="conv_norm", count=2, batch=1, shape=(1, 24, 112, 112),
    dtype="bfloat16", target="sm_90", number=0, kernel="conv_norm_kernel", configuration={"num_warps": 4}, grid=528,
    warps=4, programs=6, by_class={"int": 300_000, "fp32": 100_000}, sectors_read=4000, ideal_sectors_read=3000,
    sectors_written=500, ideal_sectors_written=500, distinct_read=32_000, distinct_written=16_000, sampled_read=320,
    sampled_written=160, wavefronts=7000, ideal_wavefronts=7000, operand_bytes=128_000, flops=10**9,
    shared_memory=50_000, fitting=4, waves={"H100": 1.0, "H200": 1.0}, triton="3.7.1",
)  # fmt: skip


def test_bounds() -> None:
    h100 = replace(GPUS["H100"], multiprocessors=100, flop_a_clock=9890)  # 1 GHz
    found = bounds(RECORD, h100)
    assert found["issue"] == 400_000 / (4 * 100 * 1e9)
    assert found["tensor"] == 1e9 / h100.ceilings.flops
    assert bounds(replace(RECORD, dtype="float32"), h100)["tensor"] == 2 * found["tensor"]
    assert found["memory"] == 48_000 / h100.ceilings.bandwidth
    assert found["shared"] == 8000 / (100 * 1e9)
    assert bound(RECORD, h100) == ("tensor", found["tensor"])
    assert bound(replace(RECORD, distinct_read=10**9), h100)[0] == "memory"
    with pytest.raises(ValueError, match="got one of sm_80, allowed is one of sm_90"):
        bounds(RECORD, GPUS["A100"])


def test_waves() -> None:
    assert programs_that_fit("sm_90", 50_000, 4) == 233_472 // 51_024 == 4
    assert programs_that_fit("sm_80", 0, 4) == 2048 // 128
    assert programs_that_fit("sm_100", 0, 1) == 32
    assert waves("sm_90", 3 * 132 * 4, 4) == {"H100": 3.0, "H200": 3.0}
    with pytest.raises(ValueError, match="allowed are sm_80, sm_90, sm_100"):
        gpus_of("sm_86")
    assert tuple(GPUS) == bench_counts.GPUS
    assert {gpu.target for gpu in GPUS.values()} == set(bench_counts.TARGETS)


def test_samples_stand_for_the_grid() -> None:
    assert sample(8) == [(1, list(range(8)))]
    for grid in (9, 10, 14, 98, 25_088):
        (one, ends), (weight, between) = sample(grid)
        assert (one, ends) == (1, [0, grid - 1])
        assert weight * 4 == grid - 2
        assert {program % 4 for program in between} == {0, 1, 2, 3}
        assert 0 < min(between) < max(between) < grid - 1


def test_growth_is_named() -> None:
    assert grown([RECORD], [replace(RECORD, wavefronts=7210, sectors_read=4120)]) == []  # 3 %
    assert grown([RECORD], [replace(RECORD, wavefronts=7211, by_class={"int": 500_000})]) == [
        f"conv_norm_kernel of conv_norm [1, 24, 112, 112] (stem, 2nd, sm_90): {figure}; if that is meant: {update}"
        for update in [counted.UPDATE]
        for figure in ("instructions grew from 400,000 to 500,000", "wavefronts grew from 7,000 to 7,211")
    ]
    assert "it has no record" in grown([], [RECORD])[0]


def test_records_are_read_as_written(tmp_path: Path) -> None:
    file, other = tmp_path / "counts.jsonl", replace(RECORD, target="sm_80")
    write_records([RECORD, other], file)
    write_records([replace(RECORD, grid=7)], file)
    assert read_records(file) == [other, replace(RECORD, grid=7)]
    file.write_text('{"model": 1}\n')
    with pytest.raises(ValueError, match="line 1: allowed are the fields of a record"):
        read_records(file)


def test_the_command_prints_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "counts.jsonl"
    write_records([RECORD], file)
    call = ["bench", "counts", "--recorded", "--batch-size", "1", "--results", str(file)]
    assert main([*call, "--gpu", "H200"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Arithmetic, not time: ")
    assert re.search(r"stem, 2nd +\| 2 +\| conv_norm +\| 528 x 4 .*\| 0.128 / 0.0960 / 0.0320 .*\| tensor", printed)
    assert main([*call, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["launches"]
    assert (found["gpu"], found["estimated_seconds"]) == ("H100", bounds(RECORD, GPUS["H100"]))
    for options, message in (
        (["--update"], "--update: got --recorded as well"),
        (["--gpu", "A100", "--target", "sm_90"], "--gpu: got A100, allowed with sm_90 are H100, H200"),
        (["--model", "l3"], "--recorded: got efficientformer_l3, batch 1, bfloat16, sm_90, allowed are those with"),
    ):
        assert main([*call, *options]) == 1
        assert message in capsys.readouterr().err


@compiling.needs_compiler
@pytest.mark.skipif(PINNED is None or triton.__version__ != PINNED[1], reason="the records are of the pinned Triton")
def test_counts_do_not_grow() -> None:
    """A part of the records, measured anew; `effformer bench counts` measures all."""
    lines = compiling.run(str(compiling.TESTS / "count_worker.py"), OMP_NUM_THREADS="1").splitlines()
    measured = [Record(**{**line, "shape": tuple(line["shape"])}) for line in map(json.loads, lines)]
    assert len(measured) > 15  # some launches of each target
    assert not (found := grown(read_records(RECORDS), measured)), "\n".join(["counts grew", *found])
