"""EfficientFormer (arXiv 2206.01191): a vision backbone that is to be fast on NVIDIA GPUs."""

from . import ops
from .acceleration import AccelerationError, accelerate
from .backbone import build_backbone
from .config import EfficientFormerConfig
from .exporting import ExportError, export
from .factory import create_model, list_models
from .inference import Frozen, freeze
from .model import EfficientFormer, set_backend
from .version import __version__
from .weights import load_checkpoint

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
