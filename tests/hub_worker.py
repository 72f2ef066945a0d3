"""Load builds of the kernels hub as users do, and print their names and results as one JSON object.

    python tests/hub_worker.py REPOSITORY REPOSITORY ...

Started by its path, so that `kernels` is the package of PyPI: in the checkout's folder it would be the folder there.
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from effformer.kernels.tiling import choose
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from effformer import ops
from effformer.testing import Case, accuracy, draw_case

HEADS = {"num_heads": 2, "key_dim": 16, "value_dim": 32}
CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "pool_mixer": ((2, 16, 5, 6), {}),
    "conv_mlp": ((2, 16, 5, 6), {"hidden": 40}),
    "meta4d": ((2, 16, 5, 6), {"hidden": 40}),
    "conv_norm": ((2, 3, 9, 8), {"outputs": 16, "activation": "relu"}),
    "bias_attention": ((2, 20, 2 * 64), HEADS),
    "attention_mixer": ((2, 20, 32), HEADS),
    "linear_mlp": ((2, 20, 32), {"hidden": 48}),
    "head": ((2, 20, 32), {"classes": 10}),
}


class Called(TorchDispatchMode):
    """Collects the namespaces of the operators that are called within it, but for PyTorch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.namespaces: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.namespaces |= {func.namespace} - {"aten", "prim", "prims"}
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def compute(module: ModuleType, case: Case) -> dict[str, Any]:
    with Called() as called:
        result = getattr(module, case.operation)(*case.arguments, **case.options, backend="triton")
    found = accuracy(result, case.exact(), case.run("eager"))
    return {
        "operation": case.operation,
        "namespaces": sorted(called.namespaces),
        "accuracy": str(found),
        "passes": found.passes(),
    }


def tuned(module: ModuleType) -> int:
    """How many entries tuned on this machine a build uses; a warning is an error."""
    build: Any = sys.modules[f"{module.__name__}.kernels.tiling.choose"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return len(build._tuned_table().entries) - len(build.shipped_table().entries)


def run_card(path: Path, module: ModuleType) -> None:
    """Run the README's example, with a local build in place of the one on the hub."""
    (code,) = re.findall("```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)

    def get_kernel(repo_id: str, *, version: int, trust_remote_code: bool) -> ModuleType:
        return module

    kernels.get_kernel = get_kernel
    exec(code, {})


def main() -> None:
    paths = [Path(path) for path in sys.argv[1:]]
    modules = [kernels.get_local_kernel(path, backend="cpu") for path in paths]
    torch.manual_seed(0)
    cases = [draw_case(name, shape, torch.float32, **options) for name, (shape, options) in CASES.items()]
    half = [draw_case(name, CASES[name][0], torch.float16, **CASES[name][1]) for name in ("meta4d", "bias_attention")]
    found: dict[str, Any] = {
        module.__name__: {
            "version": module.__version__,
            "tuned": tuned(module),
            "results": [compute(module, case) for case in ([*cases, *half] if module is modules[0] else half)],
        }
        for module in modules
    }
    found["effformer"] = {"results": [compute(ops, case) for case in half]}
    found["user's file"] = str(choose.user_file())
    run_card(paths[0] / "README.md", modules[0])
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
