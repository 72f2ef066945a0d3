"""The report: comparisons, tables, pictures, README. All figures are made up."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from effformer.bench.measure.network_providers import PROVIDERS, Measurement
from effformer.bench.measure.records import Machine, Record, append_records
from effformer.bench.report.comparison import NETWORKS, OPERATIONS, ResultsFolder, read_folder
from effformer.bench.report.readme import BEGIN, END, NOTHING, report, with_results
from effformer.bench.report.tables import error, number, provider_rows, summary_row, table, times, words, worst_error

from effformer.cli import main

ROOT = Path(__file__).parent.parent
GPU = Machine("Made-up GPU", "1.2", "2.11.0", "3.6.0", "1.0", "code", "aaaaaaaaaaaa", "2026-01-01T00:00:00+00:00")
LATER = replace(GPU, date="2026-01-02T00:00:00+00:00", commit="bbbbbbbbbbbb", sources="other code")
CPU = replace(GPU, gpu="cpu: Made-up", driver="none")
L1 = "efficientformer_l1"


def network(provider: str, machine: Machine = GPU, *, op: str = L1, dtype: str = "bfloat16", batch: int = 256,
            size: int = 224, details: dict[str, Any] | None = None, **metrics: float) -> list[Record]:  # fmt: skip
    """Records of a provider; keywords are metrics: rate, ms, p99, peak, error, top1. Details are those of "ms"."""
    names = {"rate": "img/s", "p99": "p99 ms", "peak": "peak MiB", "error": "max error", "top1": "top-1 agreement"}
    shape = (batch, 3, size, size)
    return [
        Record(op, provider, "forward", dtype, shape, names.get(name, name), value, machine,
               details=details or {} if name == "ms" else {})
        for name, value in metrics.items()
    ]  # fmt: skip


def not_run(provider: str, why: str, machine: Machine = GPU) -> Record:
    return Record(L1, provider, "forward", "bfloat16", (256, 3, 224, 224), "not run", math.nan, machine, why=why)


def whole(
    ours: float, machine: Machine = GPU, *, batch: int = 256, op: str = L1, dtype: str = "bfloat16"
) -> list[Record]:
    """Every provider: timm's at 100 img/s and 10 ms, ours frozen so many times as fast and measured again."""
    found = []
    for provider in PROVIDERS:
        speed = ours if provider.name == "ours frozen" else 1.0
        details = {"again": 10 / speed, "compile options": {"max_autotune": True}}
        found += network(provider.name, machine, op=op, dtype=dtype, batch=batch, details=details, rate=100 * speed,
                         ms=10 / speed, p99=11 / speed, peak=200, error=1e-3, top1=0.99)  # fmt: skip
    return found


def kernel(provider: str, ms: float, machine: Machine = GPU, *, op: str = "meta4d", shape: tuple[int, ...] = (256, 48, 56, 56),
           roofline: float | None = None, options: dict[str, Any] | None = None) -> list[Record]:  # fmt: skip
    figures = {"ms": ms, "TFLOP/s": 100 / ms, "GB/s": 1000 / ms, "max error": 2e-3}
    details = {"options": options or {}}
    return [
        Record(op, provider, "forward", "bfloat16", shape, metric, value, machine, details=details, roofline=roofline)
        for metric, value in figures.items()
    ]


def results(folder: Path, networks: list[Record], operations: list[Record] | None = None) -> ResultsFolder:
    for name, records in ((NETWORKS, networks), (OPERATIONS, operations or [])):
        if records:
            append_records(folder / name, records)
    return read_folder(folder)


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


# --- report, pictures, README -----------------------------------------------------------------------------------------


def test_report_shows_pictures_first_and_all_that_was_measured(tmp_path: Path) -> None:
    evil = "<script>a|b</script>"
    records = [*whole(2.0), not_run("timm gone", evil)]
    text = report(results(tmp_path, records, kernel("ours", 2.0)), [("speedup.png", "Speed-up")])
    assert text.startswith("# effformer on Made-up GPU\n\n![Speed-up](speedup.png)\n\n## Networks\n")
    assert "<script" not in text.replace("\\<", "")
    assert f"## Every provider: {L1}" in text
    assert "## Operations: meta4d" in text
    assert re.search(r"not run .* \\<script>a/b\\</script>", text)
    assert "max_autotune yes" in text
    assert "CPU run" not in text


def test_report_of_a_cpu_run_says_so(tmp_path: Path) -> None:
    assert "**CPU run: it says nothing about a GPU.**" in report(results(tmp_path, whole(2.0, CPU)), [])


def test_pictures(tmp_path: Path) -> None:
    plots = pytest.importorskip("effformer.bench.report.plots")
    ceilings = [
        Record("matmul", "torch", "forward", "bfloat16", (9, 9, 9), "TFLOP/s", 788.0, GPU),
        Record("copy", "torch", "forward", "bfloat16", (9,), "GB/s", 4300.0, GPU),
    ]
    kernels = [*ceilings, *kernel("eager", 0.5, options={"hidden": 192}), *kernel("ours", 0.1, options={"hidden": 192})]
    networks = [*whole(2.0), *whole(0.5, batch=1), *network("timm eager", batch=8, rate=math.nan)]
    found = results(tmp_path, networks, kernels)
    written = [name for name, _ in plots.draw(found, tmp_path / "report")]
    assert written == [
        "speedup-bfloat16-224x224.png",
        "throughput-bfloat16-224x224.png",
        f"blocks-{L1}-bfloat16.png",
        "roofline-bfloat16.png",
    ]
    for name in written:
        data = (tmp_path / "report" / name).read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) > 10_000


def test_pictures_name_gpu_and_dtype_and_cut_nothing_off(tmp_path: Path) -> None:
    plots = pytest.importorskip("effformer.bench.report.plots")
    found = results(
        tmp_path, [record for op in ("l1", "l3", "l7") for record in whole(2.0, op=f"efficientformer_{op}")]
    )
    with plots.plt.rc_context(plots.STYLE):
        figure = plots.throughput(found.networks, "Throughput by batch")
    assert figure.texts[0].get_text() == "Throughput by batch, Made-up GPU, bfloat16, 224x224"
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == [
        f"{name} (error 1.0e-3)"
        for name in ("effformer, frozen", "effformer, live", "effformer, eager", "timm, compiled", "timm, eager")
    ]
    figure.canvas.draw()
    box = legend.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width
    assert box.y1 < figure.axes[0].get_tightbbox().y0


def test_readme_shows_the_gpu_and_whole_measurements_only(tmp_path: Path) -> None:
    folder = tmp_path / "bench" / "results" / "made-up-gpu"
    weak = [record for record in whole(9.0, batch=1) if "max-autotune" not in record.provider]
    found = results(folder, [*whole(2.0), *weak])
    text = with_results(f"before\n{BEGIN}\nold\n{END}\nafter", [found], tmp_path)
    header, _, row, end, *_ = text.removeprefix(f"before\n{BEGIN}\n").splitlines()
    assert [cell.strip() for cell in header.split("|")[1:-1]] == [
        "model",
        "batch",
        "best timm",
        "effformer",
        "speed-up",
    ]
    assert [cell.strip() for cell in row.split("|")[1:-1]] == [
        "L1", "256", "100 (eager)", "200", "2.00x",
    ]  # fmt: skip
    assert end == "", "that is all"
    assert "Images a second on Made-up GPU, bfloat16, 224x224." in text
    assert "timm 1.0e-3, effformer 1.0e-3" in text
    assert "aaaaaaaaaaaa, 2026-01-01" in text
    assert text.endswith(f"{END}\nafter")
    assert "](bench/results/made-up-gpu/report/speedup-bfloat16-224x224.png)" in text
    assert with_results(text, [found], tmp_path) == text


def test_readme_claims_nothing_without_a_gpu(tmp_path: Path) -> None:
    text = f"{BEGIN}\n{END}"
    assert with_results(text, [results(tmp_path, whole(2.0, CPU))], tmp_path) == f"{BEGIN}\n{NOTHING}\n{END}"
    for wrong in ("", END + BEGIN, text + text):
        with pytest.raises(ValueError, match="README: got no single <!-- benchmark -->"):
            with_results(wrong, [], tmp_path)


def test_the_readme_of_this_repository_says_what_its_results_say() -> None:
    results = ["--results", str(ROOT / "bench" / "results")]
    assert main(["bench", "report", *results, "--readme", str(ROOT / "README.md"), "--check"]) == 0


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "report"]) == 1
    assert "--results: got bench/results, which has no results" in capsys.readouterr().err
    results(Path("bench/results/made-up-gpu"), whole(2.0))
    readme = Path("README.md")
    readme.write_text(f"{BEGIN}\n{END}\n")
    assert main(["bench", "report", "--readme", "README.md", "--check"]) == 1
    assert "README.md differs from the results" in capsys.readouterr().err
    assert not Path("bench/results/made-up-gpu/report").exists()
    assert main(["bench", "report", "--readme", "README.md"]) == 0
    assert "2.00x" in readme.read_text()
    assert "Made-up GPU" in Path("bench/results/made-up-gpu/report/README.md").read_text()
    assert Path(re.search(r"\]\((.*?)\)", readme.read_text()).group(1)).exists()
    assert main(["bench", "report", "--readme", "README.md", "--check"]) == 0
    assert main(["bench", "report", "--gpu", "other"]) == 1
    assert "--gpu: got 'other', allowed in bench/results are made-up-gpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--check"], "--check: got no --readme"),
        (["--readme", "README.md", "--gpu", "cpu"], "--readme: got --gpu as well"),
        (["--readme", "README.md", "--output", "x"], "--output: got 0 folders of results"),
    ],
)
def test_wrong_calls(options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "report", "--results", str(tmp_path), *options]) == 1
    assert message in capsys.readouterr().err
