"""`export`: a model as a file that runs without its Python code.

The exported graph is the packed network that `freeze` runs, folded in float64. For L1 in ONNX it has 244 nodes, where
the live network has 265, and exporting takes half the time.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..backend import no_autocast, refuse_triton, why_not_triton
from ..checks import check_choice, check_count, first_line
from ..config import LEAST_SIDE
from ..extras import install
from ..files import write_whole
from ..model.netspresso import Backbone, network_within
from ..model.network import EfficientFormer, set_backend
from ..testing import Accuracy, accuracy
from .options import Output
from .packing import OUTPUTS, Packed, device_of, pack

Format = Literal["pt2", "aoti", "onnx"]
FORMATS: tuple[str, ...] = get_args(Format)
BACKENDS = ("eager", "triton")
SUFFIXES = {"pt2": ".pt2", "aoti": ".pt2", "onnx": ".onnx"}
LEAST_FREE_SIDE = LEAST_SIDE + 1  # of a dynamic size: for a last map one pixel wide other code is traced
OPSET = 20  # of ONNX: the first with Gelu

# Not float64: files are compared with it. onnxruntime's convolutions on a CPU take no bfloat16.
DTYPES = {
    "pt2": (torch.float32, torch.bfloat16, torch.float16),
    "aoti": (torch.float32, torch.bfloat16, torch.float16),
    "onnx": (torch.float32, torch.float16),
}


class ExportError(RuntimeError):
    """PyTorch's exporters or compilers failed, or the file does not compute the same as the model."""


@dataclass(frozen=True)
class Exported:
    """The result of `export`.

    Attributes:
        path, format: the file.
        images: its input, free dimensions by name.
        dtype: of images and results.
        outputs: names of the results.
        needs: the function that loads it, and where it runs.
        checks: images' shape -> errors of the loaded file and of eager against float64, for the result with the worst.
    """

    path: Path
    format: str
    images: tuple[int | str, ...]
    dtype: torch.dtype
    outputs: tuple[str, ...]
    needs: str
    checks: dict[tuple[int, ...], Accuracy]

    def __str__(self) -> str:
        megabytes, dtype = self.path.stat().st_size / 1e6, str(self.dtype).removeprefix("torch.")
        lines = [
            f"{self.path}: {self.format}, {megabytes:.1f} MB, {dtype} images {_listed(self.images)} -> "
            + ", ".join(self.outputs),
            f"  loads with {self.needs}",
        ]
        for shape, found in self.checks.items():
            lines.append(
                f"  loaded, on images {_listed(shape)}, beside float64: max {found.max_error:.1e} "
                f"(eager {found.eager_max_error:.1e}), mean {found.mean_error:.1e} (eager {found.eager_mean_error:.1e})"
            )
        return "\n".join(lines)


def export(
    model: EfficientFormer | Backbone,
    path: str | Path,
    format: Format = "pt2",
    *,
    output: Output = "logits",
    size: tuple[int, int] = (224, 224),
    dynamic_size: bool = False,
    dtype: torch.dtype | None = None,
    backend: Literal["eager", "triton"] = "eager",
) -> Exported:
    """Write `model` to a file, load it again, and compare its results with float64; an existing file is replaced.

    As by `freeze`, BatchNorm, biases and layer scales are folded, and models in training mode, with hooks or replaced
    modules are refused. The batch size is always free. The backend is fixed in the graph: the machine that loads the
    file does not choose it, and the model's own backend is not used.

    Args:
        model: an `EfficientFormer`, or a `Backbone` of `build_backbone`, in eval mode; it is not changed. The file is
            for its device, except with ONNX.
        path: *.pt2, or *.onnx for ONNX.
        format: "pt2", a graph for `torch.export.load`; "aoti", compiled code for `torch._inductor.aoti_load_package`
            and C++ (needs a C++ compiler); "onnx", through PyTorch's dynamo exporter (extra `export`).
        output: "logits" [B, num_classes]; "pooled" [B, C]; "features", the list of maps that `forward_intermediates`
            returns. ONNX names them logits, pooled, stage1 to stage4; its input is called images.
        size: height and width of the images.
        dynamic_size: leave both free, from 33 on; compilers then tune for `size`. AOTInductor takes minutes.
        dtype: of weights, images and results, by default the model's; for ONNX float32 or float16.
        backend: "eager" is plain PyTorch operations. "triton" calls the kernels: the file loads only in a process that
            imported `effformer.kernels.operators`, since they are registered from Python.

    Raises:
        TypeError, ValueError: naming the argument that is wrong; for a model that cannot be packed.
        UnsupportedError: for backend="triton" where the kernels cannot run.
        ImportError: for "onnx" without the extra `export`.
        OSError: where the file cannot be written.
        ExportError: where exporting fails, or the loaded file's results break the rule of
            `effformer.testing.Accuracy` for the model in eager PyTorch; `path` is left as it was.
    """
    network, path = network_within(model), Path(path)
    weights = device_of(network)
    dtype = next(network.parameters()).dtype if dtype is None else dtype
    device = torch.device("cpu") if format == "onnx" else weights
    _check_format(path, format, dtype, backend)
    size = _checked_size(size, dynamic_size)
    check_choice("output", output, OUTPUTS)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"model: got one on {device}, allowed are the CPU and NVIDIA GPUs")
    if backend == "triton":
        refuse_triton(backend, why_not_triton(device, dtype, network.config.act, asked_for=True))
    with torch.inference_mode(False), torch.no_grad(), no_autocast(device):
        packed = pack(network, dtype, output)
        module = _Steps(packed, backend, None if dynamic_size else size).to(device)
        outputs = tuple(f"stage{i + 1}" for i in range(len(network.stages))) if output == "features" else (output,)
        axes = {0: "batch"} | ({2: "height", 3: "width"} if dynamic_size else {})
        with _one_error(format):
            images = torch.zeros(2, network.in_chans, *size, dtype=dtype, device=device)
            content = _content(module, images, axes, format, outputs)
            run = _load(content, format)
        shapes = [(1, *size), (3, *size)] + [(2, LEAST_FREE_SIDE, 2 * LEAST_FREE_SIDE - 1)] * dynamic_size
        exact, eager = (_Reference(network, device, kind, output) for kind in (torch.float64, dtype))
        checks = {}
        for batch, *sides in shapes:
            shape = batch, network.in_chans, *sides
            with _one_error(format):
                checks[shape] = _worst(run, exact, eager, shape)
            if not checks[shape].passes():
                found = f"{output} of images {_listed(shape)}: {checks[shape]}"
                raise ExportError(f"format={format!r}: the file does not compute the same as the model: {found}")
        write_whole(path, content)
    free = tuple(axes.get(place, length) for place, length in enumerate(images.shape))
    return Exported(path, format, free, dtype, outputs, _needs(format, backend, device), checks)


# --- the exported module ----------------------------------------------------------------------------------------------


class _Steps(nn.Module):
    """A packed network as a module: images -> result. Its tensors are buffers, so that exporters see them as weights.

    The attention bias of images of one `size` is a buffer, too; for free sizes (None) it is computed from its table.
    """

    def __init__(self, packed: Packed, backend: str, size: tuple[int, int] | None) -> None:
        super().__init__()
        self.packed, self.backend = packed, backend
        for index, step in enumerate(packed.steps):
            for place, tensor in enumerate(step.all_tensors()):
                # The kernels take channels_last filters; exporters handle contiguous ones better.
                tensor = tensor.contiguous() if backend == "eager" else tensor
                self.register_buffer(f"step{index}_{step.operation}_{place}", tensor)
        self.tensors = [name for name, _ in self.named_buffers()]
        # Not prepared for the kernels: that would fix this GPU's tiles.
        biases = [] if size is None else packed.biases(*size, "eager")
        for index, bias in enumerate(biases):
            self.register_buffer(f"bias{index}", bias)
        self.biases = None if size is None else [f"bias{index}" for index in range(len(biases))]

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        packed = self.packed.holding(self.get_buffer(name) for name in self.tensors)
        if self.biases is None:
            biases = packed.biases(images.shape[2], images.shape[3], "eager")
        else:
            biases = [self.get_buffer(name) for name in self.biases]
        return packed.run(images, biases, self.backend, prepared=False)


# --- formats ----------------------------------------------------------------------------------------------------------


def _content(module: nn.Module, images: Tensor, axes: dict[int, str], format: str, outputs: tuple[str, ...]) -> bytes:
    """The file, made in memory: PyTorch's writers end the process where the disk is full."""
    file = io.BytesIO()
    free = {place: torch.export.Dim(name, min=1 if place == 0 else LEAST_FREE_SIDE) for place, name in axes.items()}
    program = torch.export.export(module, (images,), dynamic_shapes=(free,))
    match format:
        case "pt2":
            torch.export.save(program, file)
        case "aoti":
            torch._inductor.aoti_compile_and_package(program, package_path=file)
        case "onnx":
            converted = torch.onnx.export(
                program,
                input_names=["images"],
                output_names=outputs,
                dynamic_shapes=(axes,),  # names alone: the program says which sizes are free
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
            assert converted is not None
            file.write(converted.model_proto.SerializeToString())
    return file.getvalue()


def _load(content: bytes, format: str) -> Callable[[Tensor], Tensor | list[Tensor]]:
    """The file as a function of images."""
    match format:
        case "pt2":
            return torch.export.load(io.BytesIO(content)).module()
        case "aoti":
            return torch._inductor.aoti_load_package(io.BytesIO(content))
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(result) for result in session.run(None, {"images": images.numpy()})]

    return run


def _needs(format: str, backend: str, device: torch.device) -> str:
    """The function that loads a file, and where it runs."""
    if format == "onnx":
        return f"onnxruntime.InferenceSession and its like: opset {OPSET}, self-contained"
    call = "torch.export.load" if format == "pt2" else "torch._inductor.aoti_load_package"
    here = f"on {device.type}"
    if format == "aoti":
        kind = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
        here += f" like this one ({kind}), torch {torch.__version__}"
    if backend == "triton":
        return f"{call}, only where effformer.kernels.operators was imported, {here}"
    return f"{call}, self-contained, {here}"


# --- checks -----------------------------------------------------------------------------------------------------------


def _check_format(path: Path, format: str, dtype: torch.dtype, backend: str) -> None:
    """Check the arguments that depend on the format, and the compiler or libraries that it needs."""
    check_choice("format", format, FORMATS)
    check_choice("backend", backend, BACKENDS)
    if not path.parent.is_dir():  # found now, and not after minutes of compiling
        raise FileNotFoundError(f"path: got {path}, allowed is one in a folder that exists")
    check_suffix("path", path, format)
    if dtype not in DTYPES[format]:
        allowed = ", ".join(map(str, DTYPES[format]))
        raise ValueError(f"dtype: got {dtype}, allowed with format={format!r} are {allowed}")
    if format == "onnx":
        if backend == "triton":
            raise ValueError("backend: got 'triton', allowed with format='onnx' is 'eager': ONNX has no such operators")
        try:
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise ImportError(f"{error}: format='onnx' needs {install('export')}") from error
    if format == "aoti":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise ExportError(f"format='aoti': {error}: install a C++ compiler, or name one in CXX") from error


def check_suffix(argument: str, path: Path, format: str) -> None:
    """Raise a ValueError that names the argument unless the path has the suffix of the format, in any case."""
    if path.suffix.lower() != SUFFIXES[format]:
        raise ValueError(f"{argument}: got {path}, allowed is *{SUFFIXES[format]} with format={format!r}")


def _checked_size(size: tuple[int, int], dynamic: bool) -> tuple[int, int]:
    if not isinstance(size, Sequence) or len(size) != 2:
        raise ValueError(f"size: got {size}, allowed is (height, width)")
    height, width = (check_count("size", side, least=LEAST_SIDE) for side in size)
    if dynamic and min(height, width) < LEAST_FREE_SIDE:
        allowed = f"allowed with dynamic_size=True are sides of {LEAST_FREE_SIDE} or more"
        raise ValueError(f"size: got {_listed(size)}, {allowed}")
    return height, width


class _Reference:
    """The model in eager PyTorch, its weights unfolded and rounded to `dtype`."""

    def __init__(self, network: EfficientFormer, device: torch.device, dtype: torch.dtype, output: str) -> None:
        self.network = deepcopy(network).to(device, dtype)
        self.device, self.dtype, self.output = device, dtype, output
        set_backend(self.network, "eager")

    def __call__(self, images: Tensor) -> list[Tensor]:
        images = images.to(self.device, self.dtype)
        if self.output == "features":
            return self.network.forward_intermediates(images, intermediates_only=True)
        pooled = self.network.forward_head(self.network.forward_features(images), pre_logits=True)
        return [pooled if self.output == "pooled" else self.network.logits(pooled)]


def _worst(
    run: Callable[[Tensor], Tensor | list[Tensor]], exact: _Reference, eager: _Reference, shape: tuple[int, ...]
) -> Accuracy:
    """Errors of the loaded file on random images, for the result that comes closest to breaking the rule."""
    generator = torch.Generator("cpu").manual_seed(0)
    images = torch.randn(shape, generator=generator, device="cpu").to(eager.device, eager.dtype)
    results = run(images)
    results = [results] if isinstance(results, Tensor) else results
    found = [accuracy(*each) for each in zip(results, exact(images), eager(images), strict=True)]
    return max(found, key=lambda one: (one.misplaced, (one.max_error - 2 * one.eager_max_error) / one.ulp))


@contextlib.contextmanager
def _one_error(format: str) -> Iterator[None]:
    """Turn the long errors of exporters and compilers, of many types, into an `ExportError` of one line."""
    with warnings.catch_warnings():  # PyTorch's, about itself
        warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
        warnings.filterwarnings("ignore", "No complete tensor found", UserWarning)
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        try:
            yield
        except OSError:
            raise
        except Exception as error:
            reason = first_line(error)
            raise ExportError(f"format={format!r}: {type(error).__name__}: {reason}") from error


def _listed(shape: Sequence[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"
