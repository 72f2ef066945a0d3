"""EfficientFormer (arXiv 2206.01191), a vision backbone with fused kernels for NVIDIA GPUs.

Public names are imported when they are first used (PEP 562), so that the command line answers without loading torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .version import __version__

if TYPE_CHECKING:
    from . import accuracy as accuracy
    from . import backend as backend
    from . import checkpoints as checkpoints
    from . import checks as checks
    from . import config as config
    from . import factory as factory
    from . import model as model
    from . import ops
    from . import reference as reference
    from . import serving as serving
    from . import testing as testing
    from . import workload as workload
    from .apps.explain import Explanation, explain
    from .apps.images import Preprocessing
    from .apps.warm import warm
    from .checkpoints.accelerate import AccelerationError, accelerate
    from .checkpoints.load import load_checkpoint
    from .config import EfficientFormerConfig
    from .factory import create_model, list_models
    from .model.netspresso import build_backbone
    from .model.network import EfficientFormer, set_backend
    from .serving.export import ExportError, export
    from .serving.frozen import Frozen, freeze
else:
    _MODULES = ("accuracy", "backend", "checkpoints", "checks", "config", "factory", "model", "ops", "reference",
                "serving", "testing", "workload")  # fmt: skip
    _HOMES = {
        "apps.explain": ("Explanation", "explain"),
        "apps.images": ("Preprocessing",),
        "apps.warm": ("warm",),
        "checkpoints.accelerate": ("AccelerationError", "accelerate"),
        "checkpoints.load": ("load_checkpoint",),
        "config": ("EfficientFormerConfig",),
        "factory": ("create_model", "list_models"),
        "model.netspresso": ("build_backbone",),
        "model.network": ("EfficientFormer", "set_backend"),
        "serving.export": ("ExportError", "export"),
        "serving.frozen": ("Frozen", "freeze"),
    }
    _HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

    def __getattr__(name):
        if name in _MODULES:
            return import_module(f".{name}", __name__)
        if name not in _HOME_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value = getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
        return value

    def __dir__():
        return sorted({*globals(), *_MODULES, *__all__} - {"TYPE_CHECKING", "import_module"})


__all__ = [
    "__version__",
    "AccelerationError",
    "EfficientFormer",
    "EfficientFormerConfig",
    "Explanation",
    "ExportError",
    "Frozen",
    "Preprocessing",
    "accelerate",
    "build_backbone",
    "create_model",
    "explain",
    "export",
    "freeze",
    "list_models",
    "load_checkpoint",
    "ops",
    "set_backend",
    "warm",
]
