"""Files that `export` writes: their results without this package, and the errors of `export`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run
from full_disk import full_disk
from torch import Tensor
from torch._inductor import config as inductor
from torch.export.passes import move_to_device_pass

import effformer
from effformer import EfficientFormer, ExportError, create_model
from effformer.cli import main
from effformer.config import PRESETS
from effformer.serving import export as exporting
from effformer.testing import accuracy, randomise

Narrow = Callable[..., EfficientFormer]
FEW = {"depths": (1, 1, 1, 1)}

# In a process without effformer, whose kernels another might have registered.
RUN = """
import sys, torch
path = sys.argv[1]
run = torch._inductor.aoti_load_package(path)
torch.save(run(torch.load(path + ".images")), path + ".result")
assert not any(name.startswith("effformer") for name in sys.modules)
"""


@pytest.fixture
def small_l1(monkeypatch: pytest.MonkeyPatch) -> None:
    """L1 with one block a stage: the command exports it by its name."""
    monkeypatch.setitem(PRESETS, "efficientformer_l1", replace(PRESETS["efficientformer_l1"], **FEW))  # type: ignore[arg-type]


def run_alone(path: Path, images: Tensor) -> Tensor:
    torch.save(images, f"{path}.images")
    subprocess.run([sys.executable, "-c", RUN, path], check=True, capture_output=True, text=True)
    return torch.load(f"{path}.result")


@torch.no_grad()
def check(result: Tensor, network: EfficientFormer, images: Tensor) -> None:
    """The accuracy rule for logits; the network ends up in float64."""
    eager = network(images)
    exact = network.double()(images.double())
    assert exact.std() > 0.1
    found = accuracy(result, exact, eager)
    assert found.passes(), found


def test_pt2(narrow: Narrow, tmp_path: Path) -> None:
    dtype = torch.bfloat16
    network, path = narrow(dtype=dtype, backend="auto", **FEW), tmp_path / "n.pt2"
    written = effformer.export(network, path, size=(32, 40))
    assert (written.images, written.outputs, written.dtype) == (("batch", 3, 32, 40), ("logits",), dtype)
    assert "self-contained, on cpu" in written.needs
    assert list(written.checks) == [(1, 3, 32, 40), (3, 3, 32, 40)]
    assert [file.name for file in tmp_path.iterdir()] == ["n.pt2"]
    program = torch.export.load(path)
    # Nothing is left to the machine that loads it, not even to one with a GPU and Triton.
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert all(name.startswith(("aten.", "<built-in function getitem>")) for name in called), called
    images = torch.randn(4, 3, 32, 40).to(dtype)
    check(program.module()(images), network, images)
    # Nothing is bound to the CPU.
    moved = move_to_device_pass(program, "meta").module()
    assert moved(torch.empty(5, 3, 32, 40, dtype=dtype, device="meta")).shape == (5, 10)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, exporting.Exported]:
    """An AOTInductor package, compiled once, with what makes the compiler faster and the package no other."""
    config = effformer.EfficientFormerConfig(**FEW, widths=(8, 12, 16, 24), num_vit=1, num_heads=2, key_dim=4)  # type: ignore[arg-type]
    network = randomise(EfficientFormer(config, num_classes=10)).eval()
    path = tmp_path_factory.mktemp("aoti") / "n.pt2"
    quick = {
        "aot_inductor.precompile_headers": False,
        "aot_inductor.compile_wrapper_opt_level": "O0",
        "cpp.vec_isa_ok": True,
    }
    with inductor.patch(quick):
        return path, effformer.export(network, path, "aoti", size=(64, 48))


def test_aoti_is_self_contained(package: tuple[Path, exporting.Exported], narrow: Narrow) -> None:
    path, written = package
    assert "self-contained, on cpu like this one" in written.needs
    assert list(written.checks) == [(1, 3, 64, 48), (3, 3, 64, 48)]
    images = torch.randn(5, 3, 64, 48)
    check(run_alone(path, images), narrow(dtype=torch.float32, **FEW), images)


def test_onnx_with_free_batch_and_size(narrow: Narrow, tmp_path: Path) -> None:
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    network = narrow(dtype=torch.float32, **FEW)
    written = effformer.export(
        network, tmp_path / "n.onnx", "onnx", output="features", size=(64, 64), dynamic_size=True
    )
    assert written.images == ("batch", 3, "height", "width")
    assert (2, 3, 33, 65) in written.checks
    assert [file.name for file in tmp_path.iterdir()] == ["n.onnx"]  # no weights beside it
    graph = onnx.load(tmp_path / "n.onnx").graph
    assert [d.dim_param or d.dim_value for d in graph.input[0].type.tensor_type.shape.dim] == [*written.images]
    session = onnxruntime.InferenceSession(tmp_path / "n.onnx")
    exact = narrow(**FEW)
    for shape in ((1, 3, 96, 160), (4, 3, 65, 33)):
        images = torch.randn(shape)
        results = session.run(["stage1", "stage2", "stage3", "stage4"], {"images": images.numpy()})
        with torch.no_grad():
            eager = network.forward_intermediates(images, intermediates_only=True)
            for result, its_eager, its_exact in zip(
                results, eager, exact.forward_intermediates(images.double(), intermediates_only=True), strict=True
            ):
                found = accuracy(torch.from_numpy(result), its_exact, its_eager)
                assert found.passes(), found


@pytest.mark.usefixtures("small_l1")
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "l1.pt2"
    arguments = ["export", str(target), "--checkpoint", "none", "--size", "32", "--output", "pooled", "--dtype", "half"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "weights: random (seed 0)" in out
    for part in (
        "pt2, ",
        "float16 images [batch, 3, 32, 32] -> pooled",
        "loads with torch",
        "beside float64: max",
        "MB",
    ):
        assert part in out
    torch.manual_seed(0)
    network, images = create_model("efficientformer_l1").eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        pooled = torch.export.load(target).module()(images.half())
        want = network.forward_head(network.forward_features(images), pre_logits=True)
    assert pooled.shape == (2, 448)
    assert (pooled.float() - want).abs().max() < 2e-2 * want.abs().max()

    before = target.read_bytes()
    assert main(arguments) == 1
    assert "exists: --force replaces it" in capsys.readouterr().err
    assert main([*arguments, "--format", "onnx", "--force"]) == 1
    assert "l1.pt2, allowed is *.onnx with format='onnx'" in capsys.readouterr().err
    arguments[1] = str(tmp_path / "l1.bin")
    assert main(arguments) == 1
    assert "l1.bin, allowed are *.pt2 and *.onnx" in capsys.readouterr().err
    assert target.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["l1.pt2"]


@pytest.mark.usefixtures("small_l1")
def test_the_suffix_is_the_format_and_json_is_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    target = tmp_path / "l1.onnx"
    options = ["--checkpoint", "none", "--size", "32x64", "--output", "features", "--json"]
    assert main(["export", str(target), *options]) == 0
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    assert "weights: random (seed 0)" in captured.err
    assert (facts["path"], facts["format"], facts["bytes"]) == (str(target), "onnx", target.stat().st_size)
    assert (facts["model"], facts["weights"], facts["dtype"]) == ("efficientformer_l1", "none", "float32")
    assert facts["images"] == ["batch", 3, 32, 64]
    session = onnxruntime.InferenceSession(target)
    assert facts["outputs"] == [output.name for output in session.get_outputs()]
    assert [check["shape"] for check in facts["checks"]] == [[1, 3, 32, 64], [3, 3, 32, 64]]
    assert all(0 < check["max_error"] < 1e-3 for check in facts["checks"])


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"format": "tensorrt"}, ValueError, "format: got 'tensorrt'.* allowed is one of pt2, aoti, onnx"),
        ({"path": "n.onnx"}, ValueError, r"path: got .*n.onnx, allowed is \*.pt2 with format='pt2'"),
        ({"backend": "auto"}, ValueError, "backend: got 'auto'.* allowed is one of eager, triton"),
        ({"output": "tokens"}, ValueError, "output: got 'tokens'"),
        ({"dtype": torch.float64}, ValueError, "dtype: got torch.float64"),
        (
            {"format": "onnx", "path": "n.onnx", "dtype": torch.bfloat16},
            ValueError,
            "with format='onnx' are torch.float",
        ),
        ({"format": "onnx", "path": "n.onnx", "backend": "triton"}, ValueError, "ONNX has no such operators"),
        ({"size": 224}, ValueError, r"size: got 224, allowed is \(height, width\)"),
        ({"size": (0, 32)}, ValueError, "size: got 0"),
        ({"size": (64, 31)}, ValueError, r"size: got 31 \(int\), allowed is an integer of 32 or more"),
        ({"size": (32, 64), "dynamic_size": True}, ValueError, r"got \[32, 64\], .* are sides of 33 or more"),
        ({"path": "nowhere/n.pt2"}, FileNotFoundError, "nowhere"),
    ],
    ids=str,
)
def test_refusals(
    narrow: Narrow, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"format": "pt2", "path": "n.pt2", "size": (32, 32)} | changes
    path = tmp_path / arguments.pop("path")
    with pytest.raises(error, match=message) as raised:
        effformer.export(narrow(dtype=torch.float32), path, **arguments)
    assert "\n" not in str(raised.value)
    assert not any(tmp_path.iterdir())


def test_targets_are_known_by_their_suffix_in_any_case(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def built(*arguments: object) -> None:
        raise OSError("the network is built")

    monkeypatch.setattr("effformer.commands.common.load_network", built)
    for target, format, message in (
        ("x.ONNX", None, "the network is built"),
        ("x.Pt2", None, "the network is built"),
        ("x.Pt2", "aoti", "the network is built"),
        ("x.bin", None, f"TARGET: got {tmp_path}/x.bin, allowed are *.pt2 and *.onnx"),
        ("x", None, f"TARGET: got {tmp_path}/x, allowed are *.pt2 and *.onnx"),
        ("x.onnx", "pt2", f"TARGET: got {tmp_path}/x.onnx, allowed is *.pt2 with format='pt2'"),
    ):
        option = ("--format", format) if format else ()
        status, _, err = run(capsys, "export", tmp_path / target, "--checkpoint", "none", *option)
        assert (status, err) == (1, f"effformer: error: {message}\n")


def test_models_that_are_no_list_of_operations(narrow: Narrow, tmp_path: Path) -> None:
    network, path = narrow(dtype=torch.float32), tmp_path / "n.pt2"
    with pytest.raises(TypeError, match="model: got Frozen, allowed is an EfficientFormer or a Backbone"):
        effformer.export(effformer.freeze(network), path)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="training mode"):
        effformer.export(network.train(), path)
    network.eval().stages[1].blocks[0].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"stages.1.blocks.0: submodule 'mlp' has hooks"):
        effformer.export(network, path)
    with pytest.raises(ValueError, match="output: got 'logits'"):
        effformer.export(narrow(dtype=torch.float32, num_classes=0), path)
    with pytest.raises(ValueError, match="model: got one on meta"):
        effformer.export(narrow(dtype=torch.float32).to("meta"), path)


def test_triton_needs_a_gpu(narrow: Narrow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from effformer.kernels import launch

    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(effformer.ops.UnsupportedError, match="backend='triton': 'cpu' is not an NVIDIA GPU"):
        effformer.export(narrow(dtype=torch.float32), tmp_path / "n.pt2", backend="triton")


def test_what_is_missing(narrow: Narrow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = narrow(dtype=torch.float32)
    with inductor.patch({"cpp.cxx": (None, "no-such-compiler")}), pytest.raises(ExportError, match="no-such-compiler"):
        effformer.export(network, tmp_path / "n.pt2", "aoti")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match='pip install "onnx>=.* "onnxruntime>='):
        effformer.export(network, tmp_path / "n.onnx", "onnx")


def test_a_file_that_computes_something_else_is_not_written(
    narrow: Narrow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight that is another in the file, and one that only the exporter could have lost."""
    network, path = narrow(dtype=torch.float32, **FEW), tmp_path / "n.pt2"
    path.write_bytes(b"of old")

    def spoiled(*arguments: Any, **options: Any) -> Any:
        packed = exporting_pack(*arguments, **options)
        next(step for step in packed.steps if step.table is not None).table[:, -1] += 0.1
        return packed

    exporting_pack = exporting.pack
    monkeypatch.setattr(exporting, "pack", spoiled)
    with pytest.raises(ExportError, match="the file does not compute the same as the model: logits of images"):
        effformer.export(network, path, size=(64, 64))
    monkeypatch.setattr(exporting, "_content", lambda *_: 1 / 0)
    with pytest.raises(ExportError, match="^format='pt2': ZeroDivisionError: division by zero$"):
        effformer.export(network, path)
    assert [file.name for file in tmp_path.iterdir()] == ["n.pt2"]
    assert path.read_bytes() == b"of old"


@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_a_full_disk_leaves_the_old_file(narrow: Narrow, tmp_path: Path, format: str) -> None:
    """PyTorch's own writer would end the process."""
    if format == "onnx":
        pytest.importorskip("onnxruntime")
    network, path = narrow(dtype=torch.float32, **FEW), tmp_path / f"n.{format}"
    link = tmp_path / "folder" / path.name
    link.parent.mkdir()
    link.symlink_to(path)
    path.write_bytes(b"of old")
    for target in (path, link):
        with full_disk(20_000), pytest.raises(OSError, match=f"^{target} cannot be written: File too large$"):
            effformer.export(network, target, format, size=(32, 32))  # type: ignore[arg-type]
    assert path.read_bytes() == b"of old"
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["folder", path.name, path.name]
    effformer.export(network, link, format, size=(32, 32))  # type: ignore[arg-type]
    assert link.is_symlink()
    assert len(path.read_bytes()) > 20_000


def test_the_kernels_in_a_file_need_their_registration(narrow: Narrow, tmp_path: Path) -> None:
    """Interpreted here; tests/gpu has a compiled package of them."""
    network, path = narrow(dtype=torch.float32, **FEW), tmp_path / "n.pt2"
    written = effformer.export(network, path, size=(32, 32), backend="triton")
    assert "only where effformer.kernels.operators was imported" in written.needs
    called = {str(node.target) for node in torch.export.load(path).graph.nodes}
    assert {
        f"effformer.{name}.default" for name in ("conv_norm", "meta4d", "attention_mixer", "linear_mlp", "head")
    } <= called
