"""Providers of whole networks, from timm as it is to ours frozen.

All get the same weights and the same images, rounded to the measurement's dtype: only the computing differs. Each is
built to be fast.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...backend import why_not_triton
from ...extras import install
from ...factory import create_model
from ...serving.frozen import Frozen, freeze
from ...serving.graphs import capture_graph
from ...testing import randomise
from .records import Key, Machine, Record, key_of
from .timm_model import fold_batch_norm, import_timm

TIMM_SIZE = (224, 224)  # its attention bias is for 7x7 tokens alone


class Measurement(NamedTuple):
    """A network at one batch size, dtype and image size."""

    model: str
    batch: int
    dtype: str
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.model}, {self.batch}x3x{self.height}x{self.width}, {self.dtype}"

    @property
    def torch_dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, 3, self.height, self.width

    @property
    def key(self) -> Key:
        return key_of(self.model, self.dtype, self.shape)

    def begun(self, provider: NetworkProvider, machine: Machine) -> Record:
        """The record that says that a provider was started."""
        return Record(self.model, provider.name, "forward", self.dtype, self.shape, "begun", math.nan, machine)


@dataclass(frozen=True)
class NetworkProvider:
    """One way to compute a network.

    Attributes:
        name: as in the records.
        whose: "timm", "ours", "frozen".
        channels_last: of weights and images.
        folded: BatchNorm is folded into the convolutions.
        options: of torch.compile; None for no compiling.
        captured: its calls are in a CUDA graph, as those of ours frozen are, without the checks of torch.compile.
        backend: of our live network.
    """

    name: str
    whose: str
    channels_last: bool = True
    folded: bool = False
    options: dict[str, Any] | None = None
    captured: bool = False
    backend: str = "eager"

    @property
    def wants_graph(self) -> bool:
        return self.whose == "frozen" or self.captured or bool(self.options and self.options.get("triton.cudagraphs"))

    def compiling(self) -> contextlib.AbstractContextManager[object]:
        """Make the first calls within it. Dynamo asks the global configuration, not the options of a compilation,
        whether to freeze weights, and else hands them to Inductor as inputs.
        """
        from torch._inductor import config

        return config.patch(self.options or {})

    @property
    def is_baseline(self) -> bool:
        """Whether it may be the baseline of a measurement, which is the fastest of these."""
        return self.whose == "timm" or self.options is not None

    def why_not(self, measurement: Measurement, device: torch.device) -> str | None:
        """Why it cannot be run, None if it can."""
        if self.whose == "timm":
            if importlib.util.find_spec("timm") is None:
                return f"timm is not installed ({install('timm')})"
            if (measurement.height, measurement.width) != TIMM_SIZE:
                return "timm's network takes images of 224x224 alone"
        if self.captured and device.type == "cpu":
            return "no GPU; there are no graphs"
        if self.backend == "triton" and device.type == "cpu":
            return "no GPU; times of Triton's interpreter mean nothing"
        if self.backend == "triton":
            return why_not_triton(device, measurement.torch_dtype)
        return None


# The options of mode="max-autotune", which torch.compile does not take beside others, and freezing. Where Inductor
# tunes products, it turns channels_last 1x1 convolutions into products in any case: conv_1x1_as_mm acts only where
# products are left to the libraries.
_GRAPHS = {"triton.cudagraphs": True, "coordinate_descent_tuning": True, "freezing": True}
_MOST = {"max_autotune": True, **_GRAPHS}
_UNGRAPHED = {**_MOST, "triton.cudagraphs": False}
_CONVOLVED = {"max_autotune_pointwise": True, **_GRAPHS, "conv_1x1_as_mm": False}
_MULTIPLIED = {**_CONVOLVED, "conv_1x1_as_mm": True}


def _compiled(name: str, whose: str, folded: bool) -> Iterator[NetworkProvider]:
    of = functools.partial(NetworkProvider, whose=whose, folded=folded)
    yield of(f"{name} torch.compile", options={})
    yield of(f"{name} torch.compile max-autotune", options=_MOST)
    yield of(f"{name} torch.compile max-autotune-pointwise", options=_CONVOLVED)
    yield of(f"{name} torch.compile max-autotune-pointwise + conv_1x1_as_mm", options=_MULTIPLIED)
    yield of(f"{name} torch.compile max-autotune, captured", options=_UNGRAPHED, captured=True)


PROVIDERS = (
    NetworkProvider("timm eager", "timm", channels_last=False),
    NetworkProvider("timm eager, channels_last", "timm"),
    NetworkProvider("timm eager + BN folded", "timm", channels_last=False, folded=True),
    NetworkProvider("timm eager, channels_last + BN folded", "timm", folded=True),
    *_compiled("timm", "timm", folded=True),
    NetworkProvider("ours eager", "ours"),
    NetworkProvider("ours triton", "ours", backend="triton"),
    NetworkProvider("ours frozen", "frozen"),
)
# Where timm cannot run: our own eager network in its place.
STAND_INS = tuple(_compiled("ours eager,", "ours", folded=False))
BY_NAME = {provider.name: provider for provider in (*PROVIDERS, *STAND_INS)}


def providers_of(measurement: Measurement) -> tuple[NetworkProvider, ...]:
    return PROVIDERS if (measurement.height, measurement.width) == TIMM_SIZE else PROVIDERS + STAND_INS


def strongest(measurement: Measurement) -> list[str]:
    """The compiled baselines: unless all of them were measured, a faster one may exist."""
    compiled = PROVIDERS if providers_of(measurement) == PROVIDERS else STAND_INS
    return [provider.name for provider in compiled if provider.options is not None]


def draw_weights(name: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """A network's weights in float32, by `effformer.testing.randomise`; rounded to `dtype`, if one is given.

    `dtype` then holds them exactly: a provider that keeps some in float32 has no advantage.
    """
    state = randomise(create_model(name, backend="eager")).state_dict()
    if dtype is None:
        return state
    return {key: value.to(dtype).float() if value.is_floating_point() else value for key, value in state.items()}


def draw_images(measurement: Measurement, count: int) -> Tensor:
    """Normally distributed images [count, 3, H, W] in the measurement's dtype, on the CPU, alike in every process."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, measurement.height, measurement.width, generator=generator, device="cpu")
    return images.to(measurement.torch_dtype)


class Captured(nn.Module):
    """Calls of a network by one CUDA graph: images are copied in and results out, as in the frozen form."""

    def __init__(self, network: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network = network
        self.graph: torch.cuda.CUDAGraph | None = None

    def forward(self, images: Tensor) -> Tensor:
        if self.graph is None:
            self.images = images.clone()
            _, self.graph, self.result = capture_graph(lambda: self.network(self.images), None)
        self.images.copy_(images)
        self.graph.replay()
        return self.result.clone()

    @property
    def held_bytes(self) -> int:
        """Memory of images and results, as `Frozen.held_bytes`."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.images, self.result))


@torch.no_grad()
def build(provider: NetworkProvider, measurement: Measurement, device: torch.device) -> nn.Module | Frozen:
    """A provider with the weights of `draw_weights`, on `device`: images [B, 3, H, W] -> logits.

    Its first calls belong within `compiling`.
    """
    name, dtype = measurement.model, measurement.torch_dtype
    of_timm = provider.whose == "timm"
    model = import_timm().create_model(name) if of_timm else create_model(name, backend=provider.backend)
    model.load_state_dict(draw_weights(name, dtype), strict=True)
    model.eval()
    if provider.folded:
        fold_batch_norm(model.double())
    if provider.whose == "frozen":
        return freeze(model.to(device), dtype, cuda_graphs=True, output="logits")
    layout = torch.channels_last if provider.channels_last else torch.contiguous_format
    model.to(device, dtype).to(memory_format=layout)  # type: ignore[call-overload]
    for module in model.modules():
        if fill := getattr(module, "get_attention_biases", None):
            fill(device)  # timm's cache: filling it later would mean compiling twice
    if provider.options is not None:
        model = torch.compile(model, fullgraph=True, dynamic=False, options=dict(provider.options))
    return Captured(model) if provider.captured else model


def exact_network(measurement: Measurement, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Our eager network in float64 with the providers' weights, or in float32 with these before they were rounded."""
    model = create_model(measurement.model, backend="eager")
    model.load_state_dict(draw_weights(measurement.model, measurement.torch_dtype if dtype == torch.float64 else None))
    return model.eval().to(device, dtype)
