"""The serving form of a model: `freeze`."""

from __future__ import annotations

import contextlib
import copy
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..backend import BACKENDS, no_autocast
from ..checks import check_choice, check_count, check_shapes
from ..model.adapter import Adapter, AdapterSpec
from ..model.network import EfficientFormer
from .graphs import capture_graph, wait_for
from .options import DTYPES, Options, Output, described, kind_of
from .packing import OUTPUTS, Packed, device_of, normalisation, pack
from .plans import Plans

WhenFull = Literal["run", "pad"]


def freeze(
    model: EfficientFormer | Adapter,
    dtype: torch.dtype = torch.bfloat16,
    cuda_graphs: bool = True,
    output: Output | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    max_graphs: int = 8,
    when_full: WhenFull = "run",
    new_outputs: bool = True,
    deterministic: bool = True,
    backend: str = "auto",
) -> Frozen:
    """Make a snapshot of `model` for inference: folded, packed, replayed as CUDA graphs.

    BatchNorm, convolution biases and layer scales are folded once, in float64, into the scales and shifts of fused
    operations; both heads become one. The result computes the same as `model` in eval mode, without gradients, on the
    model's device (a CPU, too). Later changes of `model` do not reach it: `Frozen.refresh` takes new weights.

    Args:
        model: an `EfficientFormer`, or an adapter around one, in eval mode; it is not changed. Adapters are the
            `Backbone` of `build_backbone`, and those of `effformer.torchvision`, `openmm` and `detectron2`.
        dtype: float16, bfloat16, float32 or float64, of weights, images and results.
        cuda_graphs: on GPUs, capture a CUDA graph for each (batch, height, width) seen. Launching a graph takes
            microseconds; without it, Python launches some thirty kernels.
        output: "logits" [B, num_classes]; "pooled" [B, C], the input of the heads; "features", the list of maps
            [B, C, h, w] that `forward_intermediates` returns. By default "logits", and for an adapter what it returns
            itself (the pyramid of `BackboneWithFPN` stays in PyTorch, in `dtype`).
        mean, std: of the channels, of images in 0 to 1, such as (0.485, 0.456, 0.406) and (0.229, 0.224, 0.225). With
            them the frozen form takes uint8 images as well, and normalises them within its first convolution.
        max_graphs: the most graphs that calls capture; the first shapes get them. Each graph keeps its images and
            results in memory. Graphs of one height and width share their attention bias, and all share the rest.
        when_full: the treatment of other shapes. "run": without a graph. "pad": the batch is padded to the next larger
            one that has a graph for the same height and width; without a graph if there is none.
        new_outputs: return new tensors. With False, results of a graph are the graph's own tensors, which its next
            replay overwrites, and no other graph's; this saves a copy.
        deterministic: the same images give the same bits. False allows atomic additions in small batches.
        backend: "auto", "eager" or "triton", see `effformer.ops`.

    Raises:
        TypeError, ValueError: naming the argument that is wrong; for a model in training mode, with hooks, replaced
            modules, or an activation with parameters.
        UnsupportedError: for backend="triton" where the kernels cannot run.
    """
    if dtype not in DTYPES:
        raise TypeError(f"dtype: got {dtype}, allowed are {', '.join(map(str, DTYPES))}")
    if output is not None:
        check_choice("output", output, OUTPUTS)
    spec = described(model, dtype, output)
    check_choice("when_full", when_full, ("run", "pad"))
    check_choice("backend", backend, BACKENDS)
    most = check_count("max_graphs", max_graphs) if cuda_graphs else 0
    pixels = normalisation(mean, std, spec.network.in_chans)
    options = Options(dtype, output, pixels, most, when_full == "pad", new_outputs, deterministic, backend)
    return Frozen(model, spec, options)


def _no_model() -> None:
    """The model of a copy."""


# Attributes that copies take; the others belong to a device, a process or a model.
_KEPT = ("dtype", "output", "in_chans", "_options", "_kind", "_act", "_convert")

# Batch, height, width, and whether the images are uint8.
Key = tuple[int, int, int, bool]


@dataclass(frozen=True)
class _Graph:
    """A captured forward: it reads `images` and `biases` and writes `results`, all of which it keeps alive."""

    graph: torch.cuda.CUDAGraph
    images: Tensor
    biases: list[Tensor]
    results: Tensor | list[Tensor]


class Frozen:
    """The result of `freeze`: call it with images.

    Calls from several threads, and on several streams, are safe: they wait for each other. While a graph is captured,
    other threads may use the GPU, but CUDA forbids them to wait for all of it (`torch.cuda.synchronize`): capture
    before they start. As with any tensors, let streams finish before you free the tensors that they read.

    If the caller is capturing the current stream, the call becomes part of the caller's graph. That graph reads the
    weights kept here, and must not outlive them. Call once before the capture, so that everything is compiled.

    Copies (`copy`, `pickle`, `torch.save`, a process started with it) have their own weights and capture their own
    graphs; where they are loaded, the backend is chosen anew. Only `copy.copy` knows the model that `refresh` reads. A
    deep copy knows the model's copy, where that was made before by the same call. Do not refresh one that is being
    pickled.

    Attributes:
        device, dtype, output: see `freeze`.
        backend: "eager" or "triton", resolved.
        reason: why the backend is "eager"; None where it is "triton".
    """

    def __init__(self, model: EfficientFormer | Adapter, spec: AdapterSpec, options: Options) -> None:
        network = spec.network
        self.dtype, self.output, self.in_chans = options.dtype, spec.output, network.in_chans
        self._options, self._kind, self._act = options, kind_of(model, spec), network.config.act
        self._convert = spec.convert
        self._begin(device_of(network), weakref.ref(model))
        with self._turn():
            self._outside_a_graph("freeze")
            self._packed = self._pack(spec)
            self._plans = Plans(self._packed, self.backend)  # of images without a graph
            self._wait()  # a caller's graph may run on another stream, and does not wait

    def _begin(self, device: torch.device, model: Callable[[], Any]) -> None:
        """Start on a device, without graphs."""
        self.device, self._model = device, model
        self.reason = self._options.why_eager(device, self._act)
        self.backend = "triton" if self.reason is None else "eager"
        self._max_graphs = self._options.max_graphs if device.type == "cuda" else 0
        self._new_outputs = self._options.new_outputs
        self._lock = threading.RLock()
        self._graphs: dict[Key, _Graph] = {}
        self._pool: Any = None
        self._ready: torch.cuda.Event | None = None  # the work of the last call is done

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: everything but graphs, locks, and the model."""
        with self._turn():
            self._outside_a_graph("pickle")
            self._wait()
        # No copies: a process that is being started takes tensors over from here after this has returned.
        return {name: getattr(self, name) for name in (*_KEPT, "_packed")}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        if any(tensor.is_shared() for tensor in self._packed.tensors()):  # by another process, which may refresh them
            self._packed = copy.deepcopy(self._packed)
        self._begin(next(self._packed.tensors()).device, _no_model)
        self._plans = Plans(self._packed, self.backend)

    def __copy__(self) -> Frozen:
        with self._turn():  # another thread may call `refresh`
            self._outside_a_graph("copy")
            packed = copy.deepcopy(self._packed)
            self._wait()
        copied = Frozen.__new__(type(self))
        copied.__setstate__(self.__getstate__() | {"_packed": packed})
        copied._model = self._model
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Frozen:
        copied = memo[id(self)] = self.__copy__()
        copied._convert = copy.deepcopy(self._convert, memo)
        model = memo.get(id(self._model()))
        copied._model = _no_model if model is None else weakref.ref(model)
        return copied

    def __repr__(self) -> str:
        graphs = ", ".join(f"{b}x{h}x{w}" for b, h, w, _ in self.graphs) or "none"
        return (
            f"Frozen(output={self.output!r}, dtype={self.dtype}, device={str(self.device)!r}, "
            f"backend={self.backend!r}, graphs: {graphs})"
        )

    @property
    def graphs(self) -> tuple[Key, ...]:
        """(batch, height, width, whether uint8) of the captured graphs."""
        return tuple(self._graphs)

    @property
    def held_bytes(self) -> int:
        """Memory of the graphs' images and results, which stay allocated; the graphs' pool is not counted."""
        tensors = (
            tensor
            for graph in tuple(self._graphs.values())  # another thread may capture meanwhile
            for tensor in (graph.images, *([graph.results] if isinstance(graph.results, Tensor) else graph.results))
        )
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def __call__(self, images: Tensor) -> Any:
        """The output for images.

        Args:
            images: normalised [B, in_chans, H, W] in the frozen dtype, any strides; or, with `mean` and `std`, uint8,
                [B, in_chans, H, W] or [B, H, W, in_chans]; on the frozen device.

        Returns:
            the `output` asked for, a tensor or a list of maps, or what the frozen adapter returns; in the frozen dtype.
            Maps are channels_last.

        Raises:
            TypeError, ValueError: for images of another dtype, shape or device, or that need a gradient.
        """
        images = self._options.check_images(images, self.in_chans, self.device)
        with self._turn():
            key = self._key(images)
            if key is None:
                # A caller's graph may be replayed when what is kept here is freed.
                return self._convert(self._plans.run(images, keep=not self._within_a_graph()))
            if key not in self._graphs:
                self._graphs[key] = self._capture(key)
            return self._convert(self._replay(self._graphs[key], images))

    def capture(self, *shapes: tuple[int, int, int], uint8: bool = False) -> None:
        """Capture a graph for each (batch, height, width), before a call does; these count into `max_graphs`.

        Raises:
            ValueError: for more than `max_graphs`, where graphs are off, for shapes other than (batch, height, width),
                or for sizes below 1.
        """
        if uint8 and self._options.pixels is None:
            raise ValueError("uint8: got True, allowed is False for a model frozen without mean and std")
        keys = [(*shape, uint8) for shape in check_shapes(shapes)]
        with self._turn():
            if len({*self._graphs, *keys}) > self._max_graphs:
                raise ValueError(f"shapes: got {shapes} beside {self.graphs}, allowed are {self._max_graphs} graphs")
            for key in keys:
                if key not in self._graphs:
                    self._outside_a_graph("capture")
                    self._graphs[key] = self._capture(key)

    def input_buffer(self, batch: int, height: int, width: int, *, uint8: bool = False) -> Tensor:
        """The images [batch, in_chans, height, width] that the graph of this shape reads, captured if need be.

        Fill it, on the stream of the calls, and call the frozen model with it: nothing is copied. It is channels_last;
        `permute(0, 2, 3, 1)` shows it as [B, H, W, in_chans]. A call with other images of the shape writes them into
        it.

        Raises:
            ValueError, RuntimeError: as `capture`.
        """
        with self._lock:  # another thread may call `clear`
            self.capture((batch, height, width), uint8=uint8)
            return self._graphs[batch, height, width, uint8].images

    def clear(self) -> None:
        """Free all graphs and their memory. The next calls capture anew.

        Raises:
            RuntimeError: where the current stream is being captured.
        """
        with self._turn():
            self._outside_a_graph("clear")
            self._wait()
            self._graphs.clear()
            self._plans.clear()
            self._pool = None

    def refresh(self, model: EfficientFormer | Adapter | None = None) -> None:
        """Take new weights: the frozen model's of now, or those of `model`, of the same kind and architecture.

        They are copied over the old ones, from any device, and captured graphs stay. The next call without `model`
        takes the weights of the model given last.

        Raises:
            ValueError: for another architecture, or without `model` in a copy, or where the model no longer exists.
            RuntimeError: where the current stream is being captured.
        """
        given = self._model() if model is None else model
        if given is None:
            raise ValueError(
                "model: got None, and this is a copy, or the frozen model no longer exists; allowed is a model"
            )
        spec = described(given, self.dtype, self._options.output)
        if self._options.output is None and kind_of(given, spec) != self._kind:
            raise ValueError(f"model: got a {type(given).__name__}, allowed is the frozen model's kind, and sizes")
        with self._turn():
            self._outside_a_graph("refresh")
            packed = self._pack(spec)
            self._wait()
            self._packed.take(packed)
            for (_, height, width, _), graph in self._graphs.items():
                for target, source in zip(graph.biases, self._packed.biases(height, width, self.backend), strict=True):
                    target.copy_(source)
            self._plans.clear()
            self._model, self._convert = weakref.ref(given), spec.convert
            self._wait()  # for a caller's graph, as above

    # --- the parts of a call ------------------------------------------------------------------------------------------

    def _pack(self, spec: AdapterSpec) -> Packed:
        mean, std = self._options.pixels or (None, None)
        options: dict[str, Any] = {"deterministic": self._options.deterministic, "stages": spec.stages}
        return pack(spec.network, self.dtype, self.output, mean, std, **options)

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """One call at a time, also on the GPU for calls on several streams; without gradients or autocast."""
        # Tensors made in inference mode could not be written again outside of it.
        with self._lock, torch.inference_mode(False), torch.no_grad(), no_autocast(self.device):
            if self.device.type != "cuda":
                yield
                return
            with torch.cuda.device(self.device):
                stream = torch.cuda.current_stream()
                if torch.cuda.is_current_stream_capturing():
                    yield
                    return
                if self._ready is not None:
                    stream.wait_event(self._ready)
                try:
                    yield
                finally:
                    self._ready = self._ready or torch.cuda.Event()
                    self._ready.record(stream)

    def _within_a_graph(self) -> bool:
        """Whether the caller is capturing a graph, so that results exist only when that is replayed."""
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _outside_a_graph(self, method: str) -> None:
        """Raise an error before CUDA does, which would end the caller's capture."""
        if self._within_a_graph():
            raise RuntimeError(f"{method}: called within the capture of a graph, allowed is before or after it")

    def _key(self, images: Tensor) -> Key | None:
        """The graph for these images, captured or to be captured; None for no graph."""
        if self._within_a_graph():
            return None
        batch, _, height, width = images.shape
        key = batch, height, width, images.dtype == torch.uint8
        if key in self._graphs or (batch > 0 and len(self._graphs) < self._max_graphs):
            return key
        larger = [known for known in self._graphs if known[1:] == key[1:] and known[0] > batch > 0]
        return min(larger) if self._options.pads and larger else None

    def _replay(self, graph: _Graph, images: Tensor) -> Tensor | list[Tensor]:
        batch = images.shape[0]
        if (images.data_ptr(), images.stride()) != (graph.images.data_ptr(), graph.images.stride()):
            graph.images[:batch].copy_(images)  # rows beyond `batch` hold old images; their results are dropped
        graph.graph.replay()

        def own(result: Tensor) -> Tensor:
            return result[:batch].clone(memory_format=torch.preserve_format) if self._new_outputs else result[:batch]

        return own(graph.results) if isinstance(graph.results, Tensor) else [own(result) for result in graph.results]

    def _capture(self, key: Key) -> _Graph:
        batch, height, width, uint8 = key
        dtype = torch.uint8 if uint8 else self.dtype
        # channels_last by its strides, also where a side is 1
        images = torch.zeros((batch, height, width, self.in_chans), dtype=dtype, device=self.device)
        images = images.permute(0, 3, 1, 2)
        of_these_sides = (graph.biases for known, graph in self._graphs.items() if known[1:3] == (height, width))
        biases = next(of_these_sides, None) or self._packed.biases(height, width, self.backend)

        def forward() -> Tensor | list[Tensor]:
            return self._packed.run(images, biases, self.backend)

        if self.backend == "triton":
            from ..kernels.launch import compile_within

            with compile_within():  # side by side, where the first forward would compile one after the other
                forward()
        # In the graphs' pool another graph's replay could overwrite a result that the caller holds.
        if not self._options.new_outputs:
            forward = self._plans.into_own_memory(images, biases)
        self._pool, graph, results = capture_graph(forward, self._pool)
        return _Graph(graph, images, biases, results)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            wait_for(self.device)
