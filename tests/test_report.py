"""The report: who is compared with whom, what tables, page, pictures and README say. All figures are made up."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from effformer.bench.measure.network_providers import PROVIDERS
from effformer.bench.measure.records import Machine, Record, append_records
from effformer.bench.report.comparison import BACKBONES, KERNELS, Measured, measured
from effformer.bench.report.page import page
from effformer.bench.report.readme import BEGIN, END, NOTHING, with_results
from effformer.bench.report.tables import error, evidence_of, kernel_tables, ladder_table, number, summary_tables, times
from effformer.bench.report.targets import target_table

from effformer.cli import main

ROOT = Path(__file__).parent.parent
GPU = Machine("Made-up GPU", "1.2", "2.11.0", "3.6.0", "aaaaaaaaaaaa", "2026-01-01T00:00:00+00:00")
LATER = replace(GPU, date="2026-01-02T00:00:00+00:00", commit="bbbbbbbbbbbb")
CPU = replace(GPU, gpu="cpu: Made-up", driver="none")
L1 = "efficientformer_l1"


def rung(provider: str, machine: Machine = GPU, *, op: str = L1, dtype: str = "bfloat16", batch: int = 256,
         size: int = 224, evidence: dict[str, Any] | None = None, **metrics: float) -> list[Record]:  # fmt: skip
    """Records of a rung; keywords are metrics: rate, ms, p99, peak, error, top1."""
    names = {"rate": "img/s", "p99": "p99 ms", "peak": "peak MiB", "error": "max error", "top1": "top-1 agreement"}
    shape = (batch, 3, size, size)
    return [
        Record(op, provider, "forward", dtype, shape, names.get(name, name), value, machine, evidence=evidence or {})
        for name, value in metrics.items()
    ]


def not_run(provider: str, why: str, machine: Machine = GPU) -> Record:
    return Record(L1, provider, "forward", "bfloat16", (256, 3, 224, 224), "not run", math.nan, machine, why=why)


def ladder(
    ours: float, machine: Machine = GPU, *, batch: int = 256, op: str = L1, dtype: str = "bfloat16"
) -> list[Record]:
    """Every rung: timm's at 100 img/s and 10 ms, ours frozen so many times as fast."""
    found = []
    for provider in PROVIDERS:
        speed = ours if provider.name == "ours frozen" else 1.0
        evidence = {"activations MiB": 100 / speed}
        found += rung(provider.name, machine, op=op, dtype=dtype, batch=batch, evidence=evidence, rate=100 * speed,
                      ms=10 / speed, p99=11 / speed, peak=200, error=1e-3, top1=0.99)  # fmt: skip
    return found


def kernel(provider: str, ms: float, machine: Machine = GPU, *, op: str = "meta4d", shape: tuple[int, ...] = (256, 48, 56, 56),
           roofline: float | None = None, options: dict[str, Any] | None = None, sources: str = "same") -> list[Record]:  # fmt: skip
    evidence = {"options": options or {}, "sources": sources}
    figures = {"ms": ms, "TFLOP/s": 100 / ms, "GB/s": 1000 / ms, "max error": 2e-3}
    return [
        Record(op, provider, "forward", "bfloat16", shape, metric, value, machine, evidence=evidence, roofline=roofline)
        for metric, value in figures.items()
    ]


def results(folder: Path, backbones: list[Record], kernels: list[Record] | None = None) -> Measured:
    for name, records in ((BACKBONES, backbones), (KERNELS, kernels or [])):
        if records:
            append_records(folder / name, records)
    return measured(folder)


def only(found: Measured) -> Any:
    (cell,) = found.comparisons
    return cell


# --- who is compared with whom ----------------------------------------------------------------------------------------


def test_the_baseline_is_the_fastest_rung_of_timm_in_the_same_cell(tmp_path: Path) -> None:
    found = results(
        tmp_path,
        [
            *rung("timm eager", rate=100, ms=2.0),
            *rung("timm torch.compile", rate=160, ms=3.0),
            *rung("ours eager", rate=500, ms=1.0),
            *rung("ours eager, torch.compile", rate=50, ms=9.0),
            *rung("ours frozen", rate=400, ms=0.5),
            *rung("timm eager", batch=1, rate=900, ms=0.1),
            *rung("timm eager", dtype="float16", rate=900, ms=0.1),
        ],
    )
    cell = next(cell for cell in found.backbones if (cell.batch, cell.dtype) == (256, "bfloat16"))
    assert cell.baseline("img/s").provider == "timm torch.compile"
    assert cell.baseline("ms").provider == "timm eager"
    assert cell.speedup("img/s") == 2.5
    assert cell.speedup("ms") == 4.0
    assert [other.speedup("img/s") for other in found.backbones if other is not cell] == [None, None]


def test_where_timm_cannot_run_the_baseline_is_our_eager_network_compiled(tmp_path: Path) -> None:
    slow = rung("ours eager, torch.compile", size=384, rate=50)
    eager = rung("ours eager", size=384, rate=70)
    cell = only(results(tmp_path, [*slow, *eager, *rung("ours frozen", size=384, rate=100)]))
    assert (cell.baseline("img/s").provider, cell.speedup("img/s")) == ("ours eager, torch.compile", 2.0)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_figures_of_two_runs_never_meet(tmp_path: Path, order: tuple[int, int]) -> None:
    """Each run's baseline and ours alone: 2x and 3x; crossed they were 1.5x or 4x."""
    runs = [
        [*rung(rival, machine, rate=base), *rung("ours frozen", machine, rate=ours)]
        for machine, rival, base, ours in ((GPU, "timm eager", 100, 200), (LATER, "timm torch.compile", 50, 150))
    ]
    cell = only(results(tmp_path, [record for index in order for record in runs[index]]))
    assert (cell.machine, cell.speedup("img/s")) == (LATER, 3.0)


def test_a_run_of_fewer_rungs_does_not_hide_a_stronger_baseline(tmp_path: Path) -> None:
    partial = [*rung("timm eager", LATER, rate=10, error=1e-3), *rung("ours frozen", LATER, rate=1000, error=1e-3)]
    alone = rung("ours frozen", replace(LATER, date="2026-01-03T00:00:00+00:00"), rate=5000)
    cell = only(results(tmp_path, [*ladder(2.0), *partial, *alone]))
    assert (cell.machine, cell.speedup("img/s")) == (GPU, 2.0)


def test_operations_of_one_code_and_options_are_one_comparison(tmp_path: Path) -> None:
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
            *kernel("eager", 0.1, LATER, op="conv_norm", shape=shape, options={"outputs": 48}, sources="other"),
        ],
    )
    assert {cell.options["outputs"]: cell.speedup("ms") for cell in found.kernels} == {24: 3.0, 48: 4.0}


def test_what_is_no_number_wins_nothing(tmp_path: Path) -> None:
    records = [
        *rung("timm eager", rate=math.nan),
        *rung("timm torch.compile", rate=100),
        *rung("ours frozen", rate=math.nan),
    ]
    cell = only(results(tmp_path, records))
    assert cell.baseline("img/s").provider == "timm torch.compile"
    assert math.isnan(cell.speedup("img/s"))
    assert times(cell.speedup("img/s")) == "NaN"


def test_a_folder_without_records_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}: got no record")):
        measured(tmp_path)


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


def test_summary_names_the_baseline_and_shows_losses_with_errors(tmp_path: Path) -> None:
    found = results(
        tmp_path,
        [
            *rung("timm eager", rate=100, ms=2.0, p99=2.5, error=1e-3, top1=0.98),
            *rung("timm torch.compile", rate=200, ms=4.0, p99=5.0, error=2e-3, top1=0.97),
            *rung("ours frozen", rate=150, ms=3.0, p99=3.5),
        ],
    )
    (table,) = summary_tables(found)
    row = dict(zip(table.header, table.rows[0], strict=True))
    assert row["baseline"] == "timm torch.compile"
    assert row["speed-up"] == "0.75x (slower)"
    assert row["its p50 (p99), ms"] == "2.00 (2.50), timm eager"
    assert (row["its max error"], row["ours, max error"]) == ("2.0e-3", "not measured")
    assert row["its top-1 agreement"] == "97%"


def test_a_rung_that_was_not_run_keeps_its_place_and_reason(tmp_path: Path) -> None:
    found = results(tmp_path, [*rung("timm eager", rate=1), not_run("ours frozen", "no memory")])
    table = ladder_table(only(found))
    assert [row[:2] for row in table.rows] == [("timm eager (the baseline)", "1.00"), ("ours frozen", "not run")]
    assert table.rows[1][-1] == "no memory"
    (summary,) = summary_tables(found)
    assert dict(zip(summary.header, summary.rows[0], strict=True))["ours, img/s"] == "not run"


def test_evidence_is_in_words(tmp_path: Path) -> None:
    evidence = {"kernels": 31, "graph": True, "frozen": None, "floor ms": 1.23456, "tiles": [{"M": 64}], "order": ["x"]}
    result = only(results(tmp_path, rung("ours frozen", evidence=evidence, ms=1.0))).ours
    assert evidence_of(result) == "kernels 31, graph yes, frozen unknown, floor ms 1.235, tiles [M 64]"


def test_operations_are_compared_with_the_fastest_other(tmp_path: Path) -> None:
    found = results(
        tmp_path, [], [*kernel("eager", 8.0), *kernel("torch.compile", 3.0), *kernel("ours", 2.0, roofline=0.4)]
    )
    (table,) = kernel_tables(found)
    ours = dict(zip(table.header, table.rows[2], strict=True))
    assert (ours["x the fastest other"], ours["µs p50 (p20 to p80)"], ours["of the floor"]) == ("1.50x", "2,000", "40%")


def outcomes(found: Measured) -> dict[str, str]:
    table = target_table(found)
    return {f"{row[0]} {row[1]}": row[-1] for row in table.rows}


def test_targets_are_met_missed_or_unmeasured(tmp_path: Path) -> None:
    records = [*ladder(2.5), *ladder(2.4, batch=1), *ladder(1.9, op="efficientformer_l3")]
    found = outcomes(results(tmp_path, records, kernel("ours", 1.0, roofline=0.9)))
    assert found[f"{L1}, batch 256: throughput over the baseline bfloat16"] == "met"
    assert found[f"{L1}, batch 256: peak activation memory, ours over the baseline bfloat16"] == "met"
    assert found[f"{L1}, batch 1: latency, baseline over ours bfloat16"] == "missed"
    assert found["efficientformer_l3, batch 256: throughput over the baseline bfloat16"] == "missed"
    assert found[f"{L1}, batch 256: throughput over the baseline float16"] == "unmeasured"
    assert found["Meta4D: of the floor, least of all stages bfloat16"] == "unmeasured", "one stage is not all"


def test_no_target_is_met_without_an_error_or_against_part_of_the_ladder(tmp_path: Path) -> None:
    name = f"{L1}, batch 256: throughput over the baseline bfloat16"
    blind = [record for record in ladder(9.0) if record.metric != "max error"]
    assert outcomes(results(tmp_path / "a", blind))[name] == "unmeasured"
    weak = [record for record in ladder(9.0) if "max-autotune" not in record.provider]
    assert outcomes(results(tmp_path / "b", weak))[name] == "unmeasured"
    strongest = "timm torch.compile max-autotune"
    stopped = [record for record in ladder(9.0) if record.provider != strongest] + [not_run(strongest, "too long")]
    found = results(tmp_path / "c", stopped)
    assert outcomes(found)[name] == "unmeasured"
    assert only(found).doubts == f"not measured, so that a rival may be faster yet: {strongest}"
    cut_off = [replace(record, evidence={**record.evidence, "cut off": True}) for record in ladder(9.0)]
    assert outcomes(results(tmp_path / "d", cut_off))[name] == "unmeasured"


def test_what_is_in_doubt_says_so(tmp_path: Path) -> None:
    drifted = [
        replace(record, why="the machine drifted")
        if (record.provider, record.metric) == ("ours frozen", "ms")
        else record
        for record in ladder(9.0)
    ]
    found = results(tmp_path / "bench", drifted)
    assert outcomes(found)[f"{L1}, batch 256: throughput over the baseline bfloat16"] == "met, in doubt"
    (table,) = summary_tables(found)
    assert "ours frozen: the machine drifted" in table.rows[0]
    text = with_results(f"{BEGIN}\n{END}", [found], tmp_path)
    assert "To be read with care: L1 at batch 256, ours frozen: the machine drifted." in text


def test_one_loss_misses_the_target_of_none(tmp_path: Path) -> None:
    name = "no network, batch, dtype and size where ours is slower than the baseline, or takes longer both"
    assert outcomes(results(tmp_path / "a", [*ladder(2.0), *ladder(0.9, batch=8)]))[name] == "missed"
    assert outcomes(results(tmp_path / "b", ladder(2.0)))[name] == "unmeasured"
    crashed = [record for record in ladder(2.0) if record.provider != "ours frozen"]
    lost = results(tmp_path / "c", [*crashed, not_run("ours frozen", "out of memory")])
    assert outcomes(lost)[name] == "missed"


# --- page, pictures, README -------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.append(tag)


def test_page_escapes_what_records_say(tmp_path: Path) -> None:
    evil = "<script>alert('&')</script>"
    found = results(tmp_path, [*ladder(2.0), *rung(f"timm {evil}", rate=1), not_run("timm gone", evil)])
    text = page(found, [("a'b.png", evil)])
    assert "script" not in Tags(text).seen
    assert "&lt;script&gt;alert(&#x27;&amp;&#x27;)&lt;/script&gt;" in text
    assert "CPU run" not in text
    assert "Targets" in text


def test_page_of_a_cpu_run_says_so(tmp_path: Path) -> None:
    text = page(results(tmp_path, ladder(2.0, CPU)), [])
    assert "<p class='cpu'>CPU run: it says nothing about a GPU.</p>" in text
    assert "Targets" not in text


def test_pictures(tmp_path: Path) -> None:
    plots = pytest.importorskip("effformer.bench.report.plots")
    ceilings = [
        Record("matmul", "torch", "forward", "bfloat16", (9, 9, 9), "TFLOP/s", 788.0, GPU),
        Record("copy", "torch", "forward", "bfloat16", (9,), "GB/s", 4300.0, GPU),
    ]
    kernels = [*ceilings, *kernel("eager", 0.5, options={"hidden": 192}), *kernel("ours", 0.1, options={"hidden": 192})]
    backbones = [*ladder(2.0), *ladder(0.5, batch=1), *rung("timm eager", batch=8, rate=math.nan)]
    written = [name for name, _ in plots.draw(results(tmp_path, backbones, kernels), tmp_path / "report")]
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


def test_readme_shows_the_gpu_and_only_what_the_whole_ladder_was_tried_on(tmp_path: Path) -> None:
    folder = tmp_path / "bench" / "results" / "made-up-gpu"
    weak = [record for record in ladder(9.0, batch=1) if "max-autotune" not in record.provider]
    found = results(folder, [*ladder(2.0), *weak])
    text = with_results(f"before\n{BEGIN}\nold\n{END}\nafter", [found], tmp_path)
    assert text.startswith(f"before\n{BEGIN}\nMade-up GPU, bfloat16, 224x224; driver 1.2, torch 2.11.0, Triton 3.6.0")
    assert text.endswith(f"{END}\nafter")
    assert "aaaaaaaaaaaa, 2026-01-01" in text
    assert (
        "| L1 | 256 | timm eager | 100 | 200 | 2.00x | 10.0 (11.0) | 5.00 (5.50) | 1.0e-3 | 1.0e-3 | 99% | 99% |"
        in text
    )
    assert "| L1 | 1 |" not in text
    assert "](bench/results/made-up-gpu/report/speedup-bfloat16-224x224.png)" in text
    assert with_results(text, [found], tmp_path) == text


def test_readme_claims_nothing_without_a_gpu(tmp_path: Path) -> None:
    text = f"{BEGIN}\n{END}"
    assert with_results(text, [results(tmp_path, ladder(2.0, CPU))], tmp_path) == f"{BEGIN}\n{NOTHING}\n{END}"
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
    assert "--results: got bench/results, where nothing was measured" in capsys.readouterr().err
    results(Path("bench/results/made-up-gpu"), ladder(2.0))
    readme = Path("README.md")
    readme.write_text(f"{BEGIN}\n{END}\n")
    assert main(["bench", "report", "--readme", "README.md", "--check"]) == 1
    assert "README.md differs from the results" in capsys.readouterr().err
    assert not Path("bench/results/made-up-gpu/report").exists()
    assert main(["bench", "report", "--readme", "README.md"]) == 0
    assert "2.00x" in readme.read_text()
    assert "Made-up GPU" in Path("bench/results/made-up-gpu/report/index.html").read_text()
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
