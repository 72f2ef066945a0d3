"""The report's pages: pictures, README and the command. All figures are made up."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from effformer.bench.measure.records import Record
from effformer.bench.report.readme import BEGIN, END, NOTHING, report, with_results
from full_disk import full_disk
from made_up_results import CPU, GPU, L1, kernel, network, not_run, results, whole

from effformer.cli import main

ROOT = Path(__file__).parent.parent


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


def test_a_full_disk_leaves_the_old_pictures(tmp_path: Path) -> None:
    plots = pytest.importorskip("effformer.bench.report.plots")
    old = tmp_path / "speedup-bfloat16-224x224.png"
    old.write_bytes(b"old")
    found = results(tmp_path / "results", whole(2.0))
    with full_disk(9_000), pytest.raises(OSError, match=f"^{old} cannot be written: "):
        plots.draw(found, tmp_path)
    assert old.read_bytes() == b"old"
    assert not list(tmp_path.glob(".*"))


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
