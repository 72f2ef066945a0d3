"""EfficientFormer (arXiv 2206.01191): a vision backbone that is to be fast on NVIDIA GPUs."""

from . import ops
from .checkpoints.accelerate import AccelerationError, accelerate
from .checkpoints.load import load_checkpoint
from .config import EfficientFormerConfig
from .factory import create_model, list_models
from .model.netspresso import build_backbone
from .model.network import EfficientFormer, set_backend
from .serving.export import ExportError, export
from .serving.frozen import Frozen, freeze
from .version import __version__

__all__ = [
    "__version__",
    "AccelerationError",
    "EfficientFormer",
    "EfficientFormerConfig",
    "ExportError",
    "Frozen",
    "accelerate",
    "build_backbone",
    "create_model",
    "export",
    "freeze",
    "list_models",
    "load_checkpoint",
    "ops",
    "set_backend",
]
