"""Modules around networks, and modules and tensors that other tools put into them: their names, and the remedy."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

# Parts of the EfficientFormers of timm, the original repository and NetsPresso Trainer; a model around one has others.
_PARTS = (("stem", "stages"), ("patch_embed", "network"), ("patch_embed", "encoder"))

_RECORDERS = ("torch.fx.", "torch.jit.", "torch.export.")
# The package of a module's or a tensor's class, or of a hook -> how the network becomes plain again.
_REMEDIES = {
    "torch.nn.utils.parametrize": "torch.nn.utils.parametrize.remove_parametrizations makes it plain",
    "torch.nn.utils.weight_norm": "torch.nn.utils.remove_weight_norm makes it plain",
    "torch.nn.utils.spectral_norm": "torch.nn.utils.remove_spectral_norm makes it plain",
    "torch.nn.utils.prune": "torch.nn.utils.prune.remove makes it plain",
    "torch.ao": "take the network as it was before it was quantised",
    "torchao": "take the network as it was before it was quantised",
    "bitsandbytes": "take the network as it was before it was quantised",
    "peft": "merge the adapters first, by merge_and_unload()",
    "torch.distributed": "take a network of one process, and load the full state dict into it, which "
    "torch.distributed.checkpoint.state_dict.get_model_state_dict gathers",
}


def class_of(value: object) -> str:
    """The class of a module or tensor as errors name it: with its package, unless it is PyTorch's own layer or ours."""
    kind = type(value)
    package = kind.__module__
    if package.startswith(("torch.nn.", "effformer.", "builtins", "__main__")) or kind is Tensor:
        return kind.__name__
    # Of PyTorch the part, such as torch.ao.
    return f"{kind.__name__} of {'.'.join(package.split('.')[: 2 if package.startswith('torch.') else 1])}"


def remedy(value: object) -> str:
    """The way from this module or tensor of another tool to a plain one, after a colon; "" where none is known."""
    if is_recorded(value):
        return ": take the network that it was made from"
    packages = [type(value).__module__]
    if isinstance(value, nn.Module):
        packages += [hook.__module__ for hook in (*value._forward_pre_hooks.values(), *value._forward_hooks.values())]
    for name, text in _REMEDIES.items():
        if any(f"{package}.".startswith(f"{name}.") for package in packages):
            return f": {text}"
    other_norm = isinstance(value, _BatchNorm) or "BatchNorm2d" in type(value).__name__
    if other_norm and type(value) not in (nn.BatchNorm2d, nn.SyncBatchNorm):
        return ": put an nn.BatchNorm2d of the same state dict and eps in its place"
    return ""


def is_efficientformer(module: object) -> bool:
    """Whether it has the parts of an EfficientFormer, ours or another library's, itself."""
    if not isinstance(module, nn.Module) or is_recorded(module):
        return False
    # Not by attribute: wrappers hand on those of the network within.
    return any(all(module._modules.get(name) is not None for name in names) for names in _PARTS)


def is_recorded(module: object) -> bool:
    """Whether a tracer or compiler made it from a network: it has the network's parts, and computes in its own way."""
    made = isinstance(module, (torch.jit.ScriptModule, torch.fx.GraphModule))
    return made or (isinstance(module, nn.Module) and type(module).__module__.startswith(_RECORDERS))


def refusal(model: object, kinds: tuple[type, ...], allowed: str) -> TypeError:
    """The error for a model that is none of `kinds`; it says where one of them, or another library's, lies in it."""
    hint = remedy(model)
    if hint == "" and is_efficientformer(model):
        hint = ": pass effformer.accelerate(model), which turns it into one"
    elif hint == "":
        parts = list(_parts(model))
        path = next((path for path, part in parts if isinstance(part, kinds)), None)
        theirs = next((path for path, part in parts if is_efficientformer(part)), None)
        if path is not None:
            hint = f": pass its part {path!r}"
        elif theirs is not None:
            hint = f": pass effformer.accelerate of its part {theirs!r}"
    return TypeError(f"model: got {class_of(model)}, allowed is {allowed}{hint}")


def part_with(model: object) -> str | None:
    """The path of the EfficientFormer, of any library, within an object around it; None without one."""
    return next((path for path, part in _parts(model) if is_efficientformer(part)), None)


def _parts(model: object) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of all within a model, without itself; of an object that is no module, of its attributes."""
    if isinstance(model, nn.Module):
        yield from ((path, part) for path, part in model.named_modules() if path)
        return
    for name, value in getattr(model, "__dict__", {}).items():
        if isinstance(value, nn.Module):
            yield from ((f"{name}.{path}".removesuffix("."), part) for path, part in value.named_modules())


def is_plain_tensor(tensor: Tensor) -> bool:
    """Whether a parameter or buffer is an ordinary dense tensor: not quantised, distributed or another subclass."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided


def why_other_tensors(model: nn.Module) -> str | None:
    """The reason why weights of `model` cannot be read: the first that is no ordinary tensor; None where all are."""
    for tensors in (model.named_parameters(), model.named_buffers()):
        for path, tensor in tensors:
            if not is_plain_tensor(tensor):
                layout = "" if tensor.layout == torch.strided else f" in {tensor.layout}"
                return f"{path} is a {class_of(tensor)}{layout}, not an ordinary tensor{remedy(tensor)}"
    return None
