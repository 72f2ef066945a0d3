"""A process without Triton's interpreter: networks over the stub driver; prints what it found as JSON."""

from __future__ import annotations

import json
import threading
from typing import Any
from unittest import mock

import torch
from effformer.bench.host.stub import stub_driver
from effformer.kernels import launch
from effformer.kernels import plan as plan_module
from effformer.kernels.launch import SIZES, recorded
from effformer.kernels.plan import Plan
from torch import Tensor
from triton.backends.nvidia import compiler, driver

from effformer import EfficientFormer, EfficientFormerConfig, freeze, warm
from effformer.testing import randomise

CONFIG = EfficientFormerConfig(depths=(1, 1, 1, 2), widths=(8, 8, 8, 16), num_vit=1, num_heads=2, key_dim=8)

Launched = tuple[int, int, list[object]]  # programs, the function, arguments


def arguments(call: Any) -> list[Launched]:
    """The launches of a call as they reach Triton's launcher, tensors as their addresses."""
    found: list[Launched] = []
    by_launcher = driver.CudaLauncher.__call__

    def spy(self: Any, x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
        values = [one.data_ptr() if isinstance(one, Tensor) else one for one in rest[4:]]
        found.append((x, id(self), values))
        by_launcher(self, x, y, z, stream, function, *rest)

    driver.CudaLauncher.__call__ = spy
    try:
        call()
    finally:
        driver.CudaLauncher.__call__ = by_launcher
    return found


def warmed() -> tuple[int, int, int, int]:
    """Kernels that `warm` compiled at first, in all, in how many threads, and those that the next forward compiled."""
    threads: list[int] = []
    batches: list[int] = []
    make, compiled = compiler.CUDABackend.make_cubin, launch.compiled

    def spy(*args: Any) -> Any:
        threads.append(threading.get_ident())
        return make(*args)

    def counted(launches: Any) -> Any:
        found = compiled(launches)
        batches.append(len(threads))
        return found

    compiler.CUDABackend.make_cubin, launch.compiled = spy, counted
    network = EfficientFormer(CONFIG, num_classes=5, backend="triton").eval().half()
    warm(network, (2, 32, 32))
    before, count = len(threads), len(set(threads))
    network(torch.zeros(2, 3, 32, 32).half())
    return batches[0], before, count, len(threads) - before


@torch.no_grad()
def main() -> None:
    report: dict[str, Any] = {"same": [], "counted": {}, "by_triton": []}
    plans: list[tuple[Plan, Tensor, list[Tensor]]] = []
    by_plan = Plan.__call__

    def noted(self: Plan, x: Tensor, tensors: Any) -> Any:
        plans.append((self, x, tensors()))
        return by_plan(self, x, tensors)

    Plan.__call__ = noted  # type: ignore[method-assign]
    with stub_driver() as stub:
        for dtype in (torch.bfloat16, torch.float32):
            network = randomise(EfficientFormer(CONFIG, num_classes=5, backend="triton")).eval().to(dtype)
            images = torch.randn(1, 3, 33, 64).to(dtype)
            for form in (network, freeze(network, dtype, backend="triton")):
                form(images)
                before = stub.launches
                form(images)
                by_driver = stub.launches - before
                with recorded() as launches:
                    form(images)
                report["counted"][f"{type(form).__name__} {dtype}"] = (by_driver, len(launches))
                before = stub.launches
                with mock.patch.multiple(plan_module, _CALLS_DIRECTLY=False), mock.patch.object(Plan, "_launch", None):
                    form(images)  # as with a newer Triton
                report["by_triton"].append((stub.launches - before, len(launches)))
            network(torch.cat([images.flatten()[:1], images.flatten()])[1:].view(images.shape))  # not aligned
        kernels = {planned.launch.kernel for plan, _, _ in plans for planned in plan._launches}
        report["specialised"] = {
            kernel.__name__: [one.name for one in kernel.params if one.name in SIZES and not one.do_not_specialize]
            for kernel in kernels
        }
        report["warm"] = warmed()
        for plan, x, tensors in plans:
            workspace = torch.empty(plan._bytes, dtype=torch.uint8)
            results = plan.new_results(x.device)
            direct = arguments(lambda: plan._launch(x, workspace, results, lambda: tensors))  # noqa: B023
            by_triton = arguments(
                lambda: [one.run() for one in plan._tensors_of(x, workspace, results, tensors)]  # noqa: B023
            )
            report["same"].append((direct == by_triton, len(direct)))
    print(json.dumps(report))  # noqa: T201


if __name__ == "__main__":
    main()
