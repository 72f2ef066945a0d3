"""Details of a provider's run, which show whether its options acted: kernels, layouts, frozen weights."""

from __future__ import annotations

import contextlib
import functools
import importlib
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._C._autograd import DeviceType

from ... import kernels
from ...serving.frozen import Frozen
from .network_providers import NetworkProvider
from .timing import synchronise

BATCH_NORM = re.compile(r"batch_?norm|\bbn_fw", re.IGNORECASE)
LAYOUT = re.compile(r"nchw_?to_?nhwc|nhwc_?to_?nchw", re.IGNORECASE)  # cuDNN's, where a map is in the other layout


def profile(call: Callable[[], object], device: torch.device) -> Any:
    """The profiler's events of one call."""
    for _ in range(2):  # on a GPU the first one starts CUPTI, and may lack the first kernels
        with torch.profiler.profile() as recorded:
            call()
            synchronise(device)
    return recorded.events() or []


def kernels_of(events: Any, on_gpu: bool) -> list[str]:
    """Names of a profile's kernels (on a CPU of its outermost operators), without copies, fills and annotations."""
    if not on_gpu:
        return [event.name for event in events if "::" in event.name and not _within_operator(event)]
    return [
        event.name
        for event in events
        if event.device_type == DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
        and not event.name.startswith(("Memcpy", "Memset"))
    ]


def count(pattern: re.Pattern[str], names: Iterable[str]) -> int:
    """The number of names with the pattern."""
    return sum(bool(pattern.search(name)) for name in names)


def _within_operator(event: Any) -> bool:
    parent = event.cpu_parent
    return parent is not None and ("::" in parent.name or _within_operator(parent))


@functools.cache
def own_kernels() -> frozenset[str]:
    """The names of this package's kernels, as a profile has them."""
    found = pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}.")
    modules = [importlib.import_module(module.name) for module in found]
    return frozenset(name for module in modules for name in vars(module) if name.endswith("_kernel"))


@dataclass
class Freezing:
    """Traces of Inductor's freezing.

    Attributes:
        inputs: of the frozen graph, which should be the images alone; None if nothing was frozen.
        batch_norms: operators left in it.
        channels_last: of the weights of all its convolutions.
    """

    inputs: int | None = None
    batch_norms: int = 0
    channels_last: bool = True


@contextlib.contextmanager
def watched_freezing() -> Iterator[Freezing]:
    """Watch Inductor's freezing within it."""
    from torch._inductor import freezing

    found, freeze = Freezing(), freezing.freeze

    def watched(*args: Any, **kwargs: Any) -> Any:
        graph, inputs = freeze(*args, **kwargs)
        found.inputs = len(inputs)
        for node in graph.graph.nodes:
            found.batch_norms += count(BATCH_NORM, [str(node.target)])
            if "convolution" in str(node.target) and len(node.args) > 1 and node.args[1].op == "get_attr":
                found.channels_last &= _is_channels_last(getattr(graph, node.args[1].target))
        return graph, inputs

    with mock.patch.object(freezing, "freeze", watched):
        yield found


def _is_channels_last(x: Tensor) -> bool:
    # oneDNN's own layouts have no strides, and count as such.
    return x.layout != torch.strided or x.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def maps_are_channels_last(model: nn.Module, images: Tensor) -> bool:
    """Whether the stem and the downsamplings of an eager network give channels_last maps."""
    kept: list[bool] = []

    def look(module: nn.Module, inputs: Any, result: Tensor) -> None:
        kept.append(result.is_contiguous(memory_format=torch.channels_last))

    watched = [module for name, module in model.named_modules() if name.endswith(("stem.conv2", "downsample.conv"))]
    with contextlib.ExitStack() as hooks:
        for module in watched:
            hooks.enter_context(module.register_forward_hook(look))
        model(images)
    return bool(kept) and all(kept)


def details_of(
    provider: NetworkProvider, network: nn.Module | Frozen, images: Tensor, freezing: Freezing
) -> dict[str, Any]:
    """Details of a provider that has been called with `images`.

    "kernels" in one call, among them "batch_norm", "layout" (conversions between NCHW and NHWC) and "triton" (ours);
    "graph": whether one was replayed; "channels_last": of the maps, or of all that Inductor compiled; "freezing".
    """
    events = profile(lambda: network(images), images.device)
    kernels = kernels_of(events, images.is_cuda)
    found: dict[str, Any] = {
        "kernels": len(kernels),
        "batch_norm": count(BATCH_NORM, kernels) + freezing.batch_norms,
        "layout": count(LAYOUT, kernels),
        "triton": sum(name in own_kernels() for name in kernels),
        "graph": any(event.name.startswith("cudaGraphLaunch") for event in events),
    }
    if isinstance(network, Frozen):
        return found | {"backend": network.backend, "backend_reason": network.reason}
    found["batch_norm_modules"] = sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    if provider.options is None:
        return found | {"channels_last": maps_are_channels_last(network, images)}
    weights = [module.weight for module in network.modules() if isinstance(module, nn.Conv2d)]
    given = all(map(_is_channels_last, [images, *weights]))
    return found | {
        "channels_last": given and freezing.channels_last,
        "freezing": freezing.inputs == 1,
        "compile options": dict(provider.options),
    }


def doubts(provider: NetworkProvider, found: dict[str, Any], device: torch.device) -> list[str]:
    """Which of a provider's options did not act by its details, in words."""
    on_gpu = device.type == "cuda"
    of_timm = provider.whose == "timm"
    options = provider.options or {}
    checks = {
        "BatchNorm is left": provider.folded and (found["batch_norm"] > 0 or found["batch_norm_modules"] > 0),
        "there is no BatchNorm": of_timm and not provider.folded and found["batch_norm"] == 0,
        "no CUDA graph was replayed": on_gpu and provider.wants_graph and not found["graph"],
        "weights were not frozen": bool(options.get("freezing")) and not found["freezing"],
        "maps are not in the layout asked for": found.get("channels_last", provider.channels_last)
        is not provider.channels_last,
        "none of our kernels ran": on_gpu
        and (provider.whose == "frozen" or provider.backend == "triton")
        and found["triton"] == 0,
    }
    return [words for words, wrong in checks.items() if wrong]
