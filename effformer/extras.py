"""Commands that install optional dependencies, for error messages."""

from __future__ import annotations

# As in pyproject.toml. An installation need not have metadata, so they stand here, too.
_REQUIREMENTS = {
    "export": ("onnx>=1.17", "onnxscript>=0.4", "onnxruntime>=1.20"),
    "hub": ("huggingface_hub>=0.30",),
    "image": ("pillow>=11", "tqdm>=4.60"),
    "netspresso": ("omegaconf>=2.3",),
    "timm": ("timm>=1.0.16",),
}


def install(extra: str) -> str:
    """The command that installs the packages of an extra, from any folder and however effformer was installed.

    The quotes hold in sh, zsh, PowerShell and cmd.

    Raises:
        KeyError: for an extra that no error message names.
    """
    return "pip install " + " ".join(f'"{requirement}"' for requirement in _REQUIREMENTS[extra])
