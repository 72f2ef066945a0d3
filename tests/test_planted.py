"""Faults planted in compiled code: some of them are planted here, and the records of all."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from compiling import TESTS, needs_compiler, run
from effformer.bench.offline.ptx_changes import KINDS, Change
from effformer.bench.offline.small_calls import FAMILIES

RECORDS = Path(__file__).parents[1] / "bench" / "results" / "planted.jsonl"


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RECORDS.read_text(encoding="utf-8").splitlines()]


@needs_compiler
def test_faults_are_found(tmp_path: Path) -> None:
    """Each as it should be: races, waits and fences by the machine, wrong values by the accuracy rule."""
    found = json.loads(run(str(TESTS / "planted_worker.py"), TRITON_CACHE_DIR=str(tmp_path)))
    assert {one["kind"] for one in found} == set(KINDS)
    expected = {
        "barrier removed": "shared race",
        "warp barrier removed": "no bar.warp.sync between",
        "wait removed": "under way",
        "wait weakened": "never written",
        "fence removed": "without fence.proxy.async",
        "commit removed": "TimeoutError",
        "mask dropped": "global race",
        "mask inverted": "global race",
        "index changed": "out of bounds",
        "swizzle changed": "shared race",
    }
    for one in found:
        if one["kind"] in expected:
            assert expected[one["kind"]] in one["found"][0], one
    values = [one for one in found if one["kind"] in ("matrix instruction changed", "shuffle changed")]
    assert [one["seen"] for one in values] == ["inaccurate", "inaccurate", None]
    assert "leave the same bits at the same places" in values[-1]["redundant"]


def test_changes_stand_once() -> None:
    change = Change("barrier removed", 2, "", "bar.sync 0", "")
    assert change.apply("{\nbar.sync 0;\n}") == "{\n;\n}"
    with pytest.raises(ValueError, match="allowed is one with 'bar.sync 0' once"):
        change.apply("{\nbar.sync 0; bar.sync 0;\n}")


def test_all_are_seen_or_redundant(records: list[dict[str, Any]]) -> None:
    assert len(records) >= 75
    for one in records:
        assert (one["seen"] is None) == (one["redundant"] is not None), one
        assert one["found"] or one["redundant"], one
        assert one["statement"] != one["change"]


def test_faults_of_all_kinds_are_everywhere(records: list[dict[str, Any]]) -> None:
    kinds = Counter(one["kind"] for one in records)
    assert set(kinds) == set(KINDS)
    assert max(kinds.values()) <= len(records) / 3
    targets = Counter(one["target"] for one in records)
    assert set(targets) == {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"}
    assert {one["dtype"] for one in records} == {"bfloat16", "float16", "float32"}
    for target in ("sm_80", "sm_90", "sm_100"):
        assert targets[target] >= 5
        assert {one["kernel"].removesuffix("_kernel") for one in records if one["target"] == target} == set(FAMILIES)


def test_no_two_are_in_one_statement(records: list[dict[str, Any]]) -> None:
    names = ("target", "dtype", "operation", "shape", "kernel", "line", "statement")
    assert len({tuple(str(one[name]) for name in names) for one in records}) == len(records)


def test_the_barrier_of_the_224_channel_block(records: list[dict[str, Any]]) -> None:
    found = [one for one in records if "tl.debug_barrier" in one["note"]]
    assert [one["target"] for one in found] == ["sm_80", "sm_90", "sm_100"]
    for one in found:
        assert one["kind"] == "barrier removed"
        assert "global race: read of what another warp wrote, no barrier between" in one["note"]
