"""Time on the host of one forward and of one launch, without a GPU (`make host`).

Our network runs over a stub driver: all that Python, PyTorch and Triton do on the host happens, and no kernel runs. Its
widths are 8 channels, so that timm's modules, which do compute, on one thread of the CPU, spend their time on the host
as well. What a GPU's driver and allocator take is in neither.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...config import PRESETS
from ...files import write_whole
from ...kernels.fold import Parameters
from ...kernels.launch import Launch, recorded
from ...kernels.operators import call
from ...kernels.plan import Plan
from ...model.network import EfficientFormer
from ...serving.frozen import freeze
from ...testing import linear_mlp_case, randomise
from ..measure.timm_model import import_timm
from .stub import stub_driver

WIDTH = 8
SIDE = 224
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CHAIN = 10  # MLPs one after the other, of three launches each, to time a launch


@dataclass(frozen=True)
class Host:
    """Times on the host, medians.

    Attributes:
        timm: milliseconds of a forward of timm's network in float32.
        live, frozen: milliseconds of a forward of ours, by dtype.
        launches: of one forward of ours, by form and dtype, counted by the driver.
        triton, plan: microseconds of one launch by Triton's `kernel[grid](...)`, and within a plan.
    """

    timm: float
    live: dict[str, float]
    frozen: dict[str, float]
    launches: dict[str, int]
    triton: float
    plan: float

    def table(self) -> str:
        lines = [f"{'timm, float32':<17}{self.timm:8.3f} ms a forward"]
        for form, times in (("live", self.live), ("frozen", self.frozen)):
            for name, ms in times.items():
                ratio, launches = ms / self.timm, self.launches[f"{form} {name}"]
                label = f"{form}, {name}"
                lines.append(f"{label:<17}{ms:8.3f} ms, {ratio:.2f} of timm's, {launches} launches")
        ratio = self.plan / self.triton
        lines.append(f"a launch by Triton {self.triton:6.2f} us, in a plan {self.plan:.2f} us, {ratio:.2f} of it")
        return "\n".join(lines)


@torch.no_grad()
def measure(repeats: int, dtypes: Sequence[torch.dtype] = DTYPES) -> Host:
    """Measure on one thread of this machine; medians of `repeats`.

    Raises:
        RuntimeError: where there can be no stub driver.
        ImportError: without timm and torchvision.
    """
    torch.set_num_threads(1)
    config = replace(PRESETS["efficientformer_l1"], widths=(WIDTH,) * 4)
    x = torch.randn(1, 3, SIDE, SIDE)
    live: dict[str, float] = {}
    frozen: dict[str, float] = {}
    launches: dict[str, int] = {}
    with stub_driver() as stub:
        for dtype in dtypes:
            name = str(dtype).removeprefix("torch.")
            network = EfficientFormer(config, num_classes=WIDTH, backend="triton").eval().to(dtype)
            images = x.to(dtype)
            forms: tuple[tuple[str, dict[str, float], Callable[[Tensor], Any]], ...] = (
                ("live", live, randomise(network)),
                ("frozen", frozen, freeze(network, dtype, backend="triton")),
            )
            for form, times, forward in forms:
                times[name] = _median(partial(forward, images), repeats) * 1e3
                before = stub.launches
                forward(images)
                launches[f"{form} {name}"] = stub.launches - before
        plan, triton = _launch_times(repeats)
    theirs = _timms(config.depths, config.num_vit)
    return Host(_median(lambda: theirs(x), repeats) * 1e3, live, frozen, launches, triton * 1e6, plan * 1e6)


def _timms(depths: Sequence[int], num_vit: int) -> nn.Module:
    import_timm()
    from timm.models.efficientformer import EfficientFormer as Theirs

    network: nn.Module = Theirs(depths=tuple(depths), embed_dims=(WIDTH,) * 4, num_vit=num_vit, num_classes=WIDTH)
    return network.eval()


def _launch_times(repeats: int) -> tuple[float, float]:
    """Seconds of one launch in a plan and by Triton, of the same kernels with the same arguments."""
    case = linear_mlp_case(torch.randn(1, 49, WIDTH).half(), hidden=4 * WIDTH)
    x, *tensors = case.arguments
    parameters = Parameters(tensors, x.dtype)
    own = [parameters.own(tensor) for tensor in tensors]

    def forward(x: Tensor) -> Tensor:
        for _ in range(CHAIN):
            x = call("linear_mlp", x, own, case.options)
        return x

    plan = Plan(forward, x, parameters, tensors)
    with recorded() as launches:
        plan(x, lambda: tensors)
    arguments = [_positional(launch) for launch in launches]

    def by_triton() -> None:
        for launch, values in zip(launches, arguments, strict=True):
            launch.kernel[(launch.grid,)](*values, **launch.options)

    ours, theirs = _median(lambda: plan(x, lambda: tensors), repeats), _median(by_triton, repeats)
    return ours / len(launches), theirs / len(launches)


def _positional(launch: Launch) -> list[Any]:
    values = {**launch.arguments, **launch.constants}
    return [values[name] for name in launch.kernel.arg_names]


def _median(run: Callable[[], object], repeats: int) -> float:
    """Seconds; the first calls, which compile, do not count."""
    for _ in range(max(3, repeats // 10)):
        run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    options = parser.parse_args(arguments)
    found = measure(options.repeats)
    print(found.table())
    if options.out:
        machine = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
        write_whole(options.out, json.dumps(vars(found) | machine, indent=1) + "\n")


if __name__ == "__main__":
    main()
