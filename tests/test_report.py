"""The report's comparisons and tables. All figures are made up."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from effformer.bench.measure.network_providers import PROVIDERS, Measurement
from effformer.bench.measure.records import Record
from effformer.bench.report.comparison import ResultsFolder, read_folder
from effformer.bench.report.readme import BEGIN, END, with_results
from effformer.bench.report.tables import error, number, provider_rows, summary_row, table, times, words, worst_error
from made_up_results import GPU, L1, kernel, network, not_run, results, whole

LATER = replace(GPU, date="2026-01-02T00:00:00+00:00", commit="bbbbbbbbbbbb", sources="other code")


def only(found: ResultsFolder) -> Any:
    (one,) = found.networks + found.operations
    return one


# --- comparisons ----------------------------------------------------------------------------------------------------


def test_the_baseline_is_the_fastest_form_of_timm_in_the_same_measurement(tmp_path: Path) -> None:
    found = results(
        tmp_path,
        [
            *network("timm eager", rate=100, ms=2.0),
            *network("timm torch.compile", rate=160, ms=3.0),
            *network("ours eager", rate=500, ms=1.0),
            *network("ours eager, torch.compile", rate=50, ms=9.0),
            *network("ours frozen", rate=400, ms=0.5),
            *network("timm eager", batch=1, rate=900, ms=0.1),
            *network("timm eager", dtype="float16", rate=900, ms=0.1),
        ],
    )
    one = next(one for one in found.networks if (one.batch, one.dtype) == (256, "bfloat16"))
    assert one.baseline("img/s").provider == "timm torch.compile"
    assert one.baseline("ms").provider == "timm eager"
    assert one.speedup("img/s") == 2.5
    assert one.speedup("ms") == 4.0
    assert [other.speedup("img/s") for other in found.networks if other is not one] == [None, None]


def test_where_timm_cannot_run_the_baseline_is_our_eager_network_compiled(tmp_path: Path) -> None:
    slow = network("ours eager, torch.compile", size=384, rate=50)
    eager = network("ours eager", size=384, rate=70)
    one = only(results(tmp_path, [*slow, *eager, *network("ours frozen", size=384, rate=100)]))
    assert (one.baseline("img/s").provider, one.speedup("img/s")) == ("ours eager, torch.compile", 2.0)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_figures_of_two_setups_never_meet(tmp_path: Path, order: tuple[int, int]) -> None:
    """Each one's baseline and ours alone: 2x and 3x; crossed they were 1.5x or 4x."""
    runs = [
        [*network(other, machine, rate=base), *network("ours frozen", machine, rate=ours)]
        for machine, other, base, ours in ((GPU, "timm eager", 100, 200), (LATER, "timm torch.compile", 50, 150))
    ]
    one = only(results(tmp_path, [record for index in order for record in runs[index]]))
    assert (one.machine, one.speedup("img/s")) == (LATER, 3.0)


def test_a_run_of_fewer_providers_does_not_hide_a_stronger_baseline(tmp_path: Path) -> None:
    partial = [
        *network("timm eager", LATER, rate=10, error=1e-3),
        *network("ours frozen", LATER, rate=1000, error=1e-3),
    ]
    alone = network("ours frozen", replace(LATER, sources="newest"), rate=5000)
    one = only(results(tmp_path, [*whole(2.0), *partial, *alone]))
    assert (one.machine, one.speedup("img/s")) == (GPU, 2.0)


def test_one_setup_is_one_comparison_by_options(tmp_path: Path) -> None:
    """At other dates, and with other commits: a run goes on, and its results are committed."""
    again = replace(GPU, date="2026-01-05T00:00:00+00:00", commit="of results alone")
    shape = (256, 3, 224, 224)
    found = results(
        tmp_path,
        [],
        [
            *kernel("eager", 3.0, again, op="conv_norm", shape=shape, options={"outputs": 24}),
            *kernel("ours", 1.0, op="conv_norm", shape=shape, options={"outputs": 24}),
            *kernel("eager", 8.0, op="conv_norm", shape=shape, options={"outputs": 48}),
            *kernel("ours", 2.0, op="conv_norm", shape=shape, options={"outputs": 48}),
            *kernel("eager", 0.1, LATER, op="conv_norm", shape=shape, options={"outputs": 48}),
        ],
    )
    assert {one.options["outputs"]: one.speedup("ms") for one in found.operations} == {24: 3.0, 48: 4.0}


def test_starts_are_no_results_and_the_last_record_counts(tmp_path: Path) -> None:
    begun = Measurement(L1, 256, "bfloat16", 224, 224).begun(PROVIDERS[0], GPU)
    first, again = (network("ours frozen", rate=rate, ms=1.0) for rate in (500, 400))
    one = only(results(tmp_path, [begun, *network("timm torch.compile", rate=100), *first, *again]))
    assert list(one.results) == ["timm torch.compile", "ours frozen"]
    assert one.speedup("img/s") == 4.0


def test_what_is_no_number_wins_nothing(tmp_path: Path) -> None:
    records = [
        *network("timm eager", rate=math.nan),
        *network("timm torch.compile", rate=100),
        *network("ours frozen", rate=math.nan),
    ]
    one = only(results(tmp_path, records))
    assert one.baseline("img/s").provider == "timm torch.compile"
    assert math.isnan(one.speedup("img/s"))
    assert times(one.speedup("img/s")) == "NaN"


def test_a_folder_without_records_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}: got no record")):
        read_folder(tmp_path)


# --- what tables say --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (12345.6, "12,346"),
        (1.234, "1.23"),
        (0.01234, "0.0123"),
        (0, "0"),
        (None, ""),
        (math.nan, "NaN"),
        (math.inf, "+inf"),
    ],
)
def test_numbers(value: float | None, text: str) -> None:
    assert number(value) == text


def test_errors_and_losses_are_said() -> None:
    assert [error(value) for value in (3.14e-3, None, math.nan)] == ["3.1e-3", "not measured", "NaN"]
    assert [times(value) for value in (2.506, 0.871, None)] == ["2.51x", "0.87x (slower)", ""]


def test_the_worst_error_hides_nothing(tmp_path: Path) -> None:
    found = [only(results(tmp_path / str(n), network("ours frozen", rate=1, error=e))).ours for n, e in
             enumerate((1e-3, math.nan, 2e-3))]  # fmt: skip
    assert worst_error(found) == "NaN"
    assert worst_error(found[::2]) == "2.0e-3"
    blind = only(results(tmp_path / "blind", network("ours frozen", rate=1))).ours
    assert worst_error([found[0], blind]) == worst_error([]) == "not measured"


def test_a_table_is_markdown_without_empty_columns() -> None:
    rows = [{"a": "1", "b": "", "c": "x|y\nz", "d": "left out"}, {"a": "22", "b": "", "c": "", "d": ""}]
    assert table(rows, ["d"]).splitlines() == ["| a  | c |", "| -- | - |", "| 1  | x/y z |", "| 22 |   |"]


def test_summary_names_the_baseline_and_shows_losses_with_errors(tmp_path: Path) -> None:
    found = results(
        tmp_path,
        [
            *network("timm eager", rate=100, ms=2.0, p99=2.5, error=1e-3, top1=0.98),
            *network("timm torch.compile", rate=200, ms=4.0, p99=5.0, error=2e-3, top1=0.97),
            *network("ours frozen", rate=150, ms=3.0, p99=3.5),
        ],
    )
    row = summary_row(only(found))
    assert (row["model"], row["baseline"], row["img/s"]) == ("L1", "timm torch.compile", "200 / 150")
    assert row["speed-up"] == "0.75x (slower)"
    assert (row["ms p50"], row["ms p99"]) == ("2.00 / 3.00", "2.50 / 3.50"), "of timm eager, the quickest"
    assert row["max error"] == "2.0e-3 / not measured"
    assert row["top-1 agreement"] == "97% / "


def test_a_provider_that_was_not_run_keeps_its_place_and_reason(tmp_path: Path) -> None:
    found = results(tmp_path, [*network("timm eager", rate=1), not_run("ours frozen", "no memory")])
    first, second = provider_rows(only(found))
    assert (first["provider"], first["img/s"]) == ("timm eager (the baseline)", "1.00")
    assert (second["provider"], second["img/s"], second["remarks"]) == ("ours frozen", "not run", "no memory")
    assert second["max error"] == ""
    assert summary_row(only(found))["img/s"] == "1.00 / not run"


def test_details_are_in_words(tmp_path: Path) -> None:
    details = {"kernels": 31, "graph": True, "frozen": None, "roofline ms": 1.23456, "tiles": [{"M": 64}]}
    (row,) = provider_rows(only(results(tmp_path, network("ours frozen", details=details, ms=1.0))))
    assert row["details"] == "kernels 31, graph yes, frozen unknown, roofline ms 1.235, tiles [M 64]"
    assert words(False) == "no"


def test_operations_are_compared_with_the_fastest_other(tmp_path: Path) -> None:
    found = results(
        tmp_path, [], [*kernel("eager", 8.0), *kernel("torch.compile", 3.0), *kernel("ours", 2.0, roofline=0.4)]
    )
    eager, compiled, ours = provider_rows(only(found))
    assert (ours["x baseline"], ours["µs p50 (p20 to p80)"], ours["of roofline"]) == ("1.50x", "2,000", "40%")
    assert (eager["x baseline"], compiled["provider"]) == ("0.38x (slower)", "torch.compile (the baseline)")


def test_what_is_whole(tmp_path: Path) -> None:
    """Every provider was tried, every compiled baseline ran, ours was measured again."""

    def is_whole(name: str, records: list[Record]) -> bool:
        return only(results(tmp_path / name, records)).is_whole

    assert is_whole("all", whole(9.0))
    assert not is_whole("weak", [record for record in whole(9.0) if "max-autotune" not in record.provider])
    assert not is_whole("once", [replace(record, details={}) for record in whole(9.0)])
    strongest = "timm torch.compile max-autotune"
    stopped = [record for record in whole(9.0) if record.provider != strongest] + [not_run(strongest, "too long")]
    assert not is_whole("stopped", stopped)
    assert only(read_folder(tmp_path / "stopped")).doubts == (
        f"not measured, so that a baseline may be faster yet: {strongest}"
    )


def test_what_is_in_doubt_says_so(tmp_path: Path) -> None:
    drifted = [
        replace(record, why="the machine drifted")
        if (record.provider, record.metric) == ("ours frozen", "ms")
        else record
        for record in whole(9.0)
    ]
    found = results(tmp_path / "bench", drifted)
    assert summary_row(only(found))["remarks"] == "ours frozen: the machine drifted"
    text = with_results(f"{BEGIN}\n{END}", [found], tmp_path)
    assert "To be read with care: L1 at batch 256, ours frozen: the machine drifted." in text
