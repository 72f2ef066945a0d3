"""Triton's launch path over a stub driver: the same arguments by a plan as by Triton, and the benchmark's figures."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from compiling import TESTS, needs_compiler, run
from effformer.bench.host.measure import Host


@needs_compiler
def test_plans_launch_what_triton_would(tmp_path: Path) -> None:
    """Also in bfloat16, which the interpreter refuses. `warm` compiles side by side, and leaves nothing to compile."""
    report: dict[str, Any] = json.loads(run(str(TESTS / "stub_worker.py"), TRITON_CACHE_DIR=str(tmp_path)))
    first, compiled, threads, later = report["warm"]
    assert first == compiled > 10  # at once, and not part by part
    assert threads > 1 or os.cpu_count() == 1
    assert later == 0
    assert len(report["specialised"]) > 6
    assert set(map(tuple, report["specialised"].values())) == {()}
    assert len(report["counted"]) == 4
    for by_driver, recorded in report["counted"].values():
        assert by_driver == recorded > 10
    assert [found for found, _ in report["by_triton"]] == [expected for _, expected in report["by_triton"]]
    assert len(report["same"]) > 12
    assert all(same and launches for same, launches in report["same"])


@needs_compiler
def test_the_benchmark_of_the_host(tmp_path: Path) -> None:
    printed = run("-m", "effformer.bench.host.measure", "--repeats", "5", "--out", str(tmp_path / "host.json"))
    found = json.loads((tmp_path / "host.json").read_text())
    assert set(found["live"]) == set(found["frozen"]) == {"float32", "float16", "bfloat16"}
    assert set(found["launches"].values()) == {33, 27}  # with folds, and without
    for line in ("live, bfloat16", "frozen, float32", "a launch by Triton"):
        assert line in printed
    assert max(found["live"].values()) < 0.5 * found["timm"]
    assert max(found["frozen"].values()) < 0.3 * found["timm"]
    assert found["plan"] < 0.35 * found["triton"]


FIRST_CALLS = """
import json
from effformer.bench.host.first_call import measure
from effformer.config import EfficientFormerConfig
from effformer.kernels import launch

config = EfficientFormerConfig(depths=(1, 1, 1, 2), widths=(8, 8, 8, 16), num_vit=1, num_heads=2, key_dim=8)
pool, sizes = launch.ThreadPoolExecutor, []
launch.ThreadPoolExecutor = lambda size: (sizes.append(size), pool(size))[1]
print(json.dumps([measure(config, [(1, 32, 32), (1, 32, 32)], 3), sizes]))
"""


@needs_compiler
def test_first_forwards_compile_and_later_ones_do_not() -> None:
    (first, second), threads = json.loads(run("-c", FIRST_CALLS))
    assert first > 1 > 10 * second
    assert set(threads) == {3}


def test_the_table_of_the_benchmark() -> None:
    host = Host(2.0, {"float32": 0.5}, {"float32": 0.25}, {"live float32": 33, "frozen float32": 27}, 15.0, 3.0)
    assert host.table().splitlines() == [
        "timm, float32       2.000 ms a forward",
        "live, float32       0.500 ms, 0.25 of timm's, 33 launches",
        "frozen, float32     0.250 ms, 0.12 of timm's, 27 launches",
        "a launch by Triton  15.00 us, in a plan 3.00 us, 0.20 of it",
    ]
