"""`accelerate`: turn another library's EfficientFormer into ours."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from ..checks import check_choice, first_line
from ..model.blocks import Meta3D
from ..model.fusion import BATCH_NORMS
from ..model.meta4d import Meta4D
from ..model.netspresso import Backbone
from ..model.network import EfficientFormer
from ..model.parts import DropPath
from ..model.wrappers import class_of, is_efficientformer, part_with, remedy, why_other_tensors
from ..ops import BACKENDS
from ..testing import accuracy, float32_as_such
from .architecture import our_modules, read_architecture
from .formats import CheckpointError, normalise
from .load import load_checkpoint

_LAYER_SCALE = re.compile(r"\.(ls[12]\.gamma|layer_scale_[12])$")
_BIAS_TABLE = re.compile(r"\.attention_biases(_seg)?$")
_NORMS = (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)


class AccelerationError(RuntimeError):
    """The new network does not compute the same as the given one."""


def accelerate(model: nn.Module, *, backend: str = "auto", probe: Tensor | None = None) -> EfficientFormer | Backbone:
    """Build our network from an EfficientFormer of timm, the original repository or NetsPresso Trainer.

    No library is imported, no class is patched, and `model` stays as it was. Architecture and state are copied into new
    tensors: weights and statistics, heads (a single head of the original stands for both), dtype, device, memory
    format, mode of each part, `requires_grad`, dropout and drop-path rates, eps and momentum of norms, SyncBatchNorm,
    distilled training, gradient checkpointing, timm's pretrained_cfg. Then both compute a probe, first as they are,
    then with random layer scales and bias tables, since initial values hide errors. The results are compared in float64
    by the accuracy rule of `effformer.testing.Accuracy`.

    Networks of timm and the original classifier take one image size; at others, ours resamples the bias table.

    Args:
        model: the network itself, not a model around it.
        backend: "auto", "eager" or "triton", see `effformer.ops`.
        probe: images [B, in_chans, H, W] of model's dtype, on its device; [1, in_chans, 224, 224] by default, normally
            distributed.

    Returns:
        an `EfficientFormer`; for NetsPresso's a `Backbone`, with its outputs.

    Raises:
        AccelerationError: (a RuntimeError) with the errors, where the rule does not hold, or `model` cannot be run.
        CheckpointError: (a RuntimeError) where the weights are not those of an EfficientFormer.
        TypeError, ValueError: for another model; one around it; one that was quantised, compiled, traced or changed in
            other ways, naming the part; one with tensors of several dtypes or devices or none; for another backend or
            probe.
    """
    check_choice("backend", backend, BACKENDS)
    _check_model(model)
    try:
        return _accelerated(model, backend, probe)
    except (AccelerationError, CheckpointError, TypeError, ValueError, torch.OutOfMemoryError):
        raise
    except RuntimeError as error:
        raise AccelerationError(f"model: it cannot be run beside the new network: {first_line(error)}") from error
    except Exception as error:  # of parts in other places, or of another kind, than an EfficientFormer's
        reason = f"{type(error).__name__}: {first_line(error)}{_foreign_part(model)}"
        raise ValueError(f"model: it cannot be read as an EfficientFormer: {reason}") from error


def _foreign_part(model: nn.Module) -> str:
    """The first part whose class is neither PyTorch's nor of the model's library, in words."""
    own = type(model).__module__.partition(".")[0]
    for path, module in model.named_modules():
        package = type(module).__module__
        if not package.startswith("torch.nn.") and package.partition(".")[0] != own:
            return f"; its {path} is a {class_of(module)}"
    return ""


def _accelerated(model: nn.Module, backend: str, probe: Tensor | None) -> EfficientFormer | Backbone:
    parameters = list(model.parameters())
    device, dtype = parameters[0].device, parameters[0].dtype
    file = normalise(model.state_dict())
    architecture = read_architecture(model, file)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        network = EfficientFormer(
            architecture.config, **architecture.settings, backend=backend, device=device, dtype=dtype
        )
        if architecture.stages < network.num_stages:
            network.prune_intermediate_layers([architecture.stages - 1])
    theirs = dict(our_modules(model, file.format))
    if isinstance(theirs.get("norm"), nn.Identity):
        network.norm = nn.Identity()
    if _has_one_head(model):
        network.head_dist = network.head
    _load(network, model)
    _carry_parts(theirs, network)
    _carry_requires_grad(model, network)
    _carry_choices(model, network)
    result = network if architecture.task is None else Backbone(network, architecture.task)
    result.training = model.training
    if probe is None:
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(1, network.in_chans, 224, 224, generator=generator).to(device, dtype)
    elif probe.dtype != dtype or probe.device != device or probe.ndim != 4:
        allowed = f"[B, {network.in_chans}, H, W] {dtype} on {device}"
        raise ValueError(f"probe: got {tuple(probe.shape)} {probe.dtype} on {probe.device}, allowed is {allowed}")
    _check_results(model, result, probe)
    return result


def _check_model(model: nn.Module) -> None:
    """Refuse other models than another library's EfficientFormer, and changed ones."""
    if isinstance(model, (EfficientFormer, Backbone)):
        raise TypeError(
            f"model: got a {type(model).__name__} of effformer, allowed is another library's EfficientFormer"
        )
    if not is_efficientformer(model):
        hint = remedy(model)
        if hint == "" and (inner := part_with(model)) is not None:
            hint = f": pass its part {inner!r}"
        allowed = "an EfficientFormer of timm, the original or NetsPresso"
        raise TypeError(f"model: got {class_of(model)}, allowed is {allowed}{hint}")
    for path, module in model.named_modules():
        place = path or "it"
        hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
        if hooks or module._backward_pre_hooks or is_parametrized(module) or "forward" in module.__dict__:
            inner = ": put its part '_orig_mod' in its place" if "_orig_mod" in module._modules else ""
            allowed = f"allowed are none{remedy(module) or inner}"
            raise ValueError(f"model: {place} has hooks, parametrisations or another forward, {allowed}")
        if isinstance(module, _BatchNorm) and type(module) not in BATCH_NORMS:
            raise ValueError(f"model: {place} is a {class_of(module)}, allowed is BatchNorm2d{remedy(module)}")
        if type(module) is not nn.SyncBatchNorm and (how := remedy(module)):
            raise ValueError(f"model: {place} is a {class_of(module)}, allowed are plain modules{how}")
    if reason := why_other_tensors(model):
        raise ValueError(f"model: {reason}")
    kinds = {
        (tensor.device, tensor.dtype)
        for tensor in [*model.parameters(), *model.buffers()]
        if tensor.is_floating_point()
    }
    if len(kinds) != 1 or next(iter(kinds))[0].type == "meta":
        found = ", ".join(sorted(f"{dtype} on {device}" for device, dtype in kinds))
        raise ValueError(f"model: got tensors of {found}, allowed are one dtype and one device that is not meta")


def _has_one_head(model: nn.Module) -> bool:
    """Whether it is the original's without distillation: its one head becomes both of ours, and their mean."""
    return isinstance(getattr(model, "head", None), nn.Linear) and getattr(model, "dist", True) is False


def _load(ours: nn.Module, theirs: nn.Module) -> None:
    state = theirs.state_dict()
    if _has_one_head(theirs):
        state |= {f"dist_{key}": value for key, value in state.items() if key.startswith("head.")}
    with warnings.catch_warnings():  # it said so when the format was read
        warnings.filterwarnings("ignore", ".*is constant: this network was trained without", UserWarning)
        load_checkpoint(ours, state)


def _carry_parts(theirs: Mapping[str, nn.Module], network: EfficientFormer) -> None:
    """Copy the settings and modes of modules."""
    for path, module in list(network.named_modules()):
        other = theirs.get(path)
        if isinstance(module, (nn.Conv2d, nn.Linear, *_NORMS)) and other is not None:
            if isinstance(other, nn.SyncBatchNorm) and isinstance(module, nn.BatchNorm2d):
                module = nn.SyncBatchNorm.convert_sync_batchnorm(module, other.process_group)
                network.set_submodule(path, module)
            if type(other) is not type(module):
                allowed = type(module).__name__
                raise ValueError(f"model: its {path} is a {class_of(other)}, allowed is {allowed}{remedy(other)}")
            for name in ("eps", "momentum"):
                if hasattr(module, name):
                    setattr(module, name, getattr(other, name))
        if isinstance(module, (Meta4D, Meta3D)):
            for name in ("drop_path1", "drop_path2"):
                drop = theirs.get(f"{path}.{name}", theirs.get(f"{path}.drop_path"))
                if not getattr(drop, "scale_by_keep", True):
                    raise ValueError(f"model: its {path}.{name} has scale_by_keep=False, allowed is True")
                rate = getattr(drop, "drop_prob", None) or 0.0
                setattr(module, name, DropPath(rate) if rate > 0 else nn.Identity())
    for path, module in network.named_modules():
        while path not in theirs:
            path = path.rpartition(".")[0]
        module.training = theirs[path].training


def _carry_requires_grad(model: nn.Module, network: EfficientFormer) -> None:
    """Convert flags like weights, since q, k and v become one parameter."""
    flags = {name: torch.tensor(float(p.requires_grad)).expand(p.shape) for name, p in model.named_parameters()}
    learned = normalise(flags).state
    for name, parameter in network.named_parameters():
        if (flag := learned.get(name)) is not None:
            if bool(flag.min() != flag.max()):
                raise ValueError(
                    f"model: query, key and value of {name} differ in requires_grad, allowed is one for all"
                )
            parameter.requires_grad_(bool(flag.max()))


def _carry_choices(model: nn.Module, network: EfficientFormer) -> None:
    network.set_grad_checkpointing(any(getattr(module, "grad_checkpointing", False) for module in model.modules()))
    network.set_distilled_training(getattr(model, "distilled_training", getattr(model, "dist", False)))
    for name in ("pretrained_cfg", "default_cfg"):  # timm's
        if hasattr(model, name):
            setattr(network, name, copy.deepcopy(getattr(model, name)))
    kernels = [p for p in model.parameters() if p.ndim == 4 and p.shape[2] > 1]
    if all(p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous() for p in kernels):
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _check_results(model: nn.Module, result: nn.Module, probe: Tensor) -> None:
    """Apply the accuracy rule to the probe, with their weights and with random ones.

    Raises:
        AccelerationError: where it does not hold.
    """
    with torch.no_grad(), torch.autocast(probe.device.type, enabled=False), float32_as_such():
        for random in (False, True):
            theirs, ours = _copy(model), _copy(result)
            if random:
                _randomise(theirs)
                _load(ours, theirs)
            eager, found = _outputs(theirs, probe), _outputs(ours, probe)
            exact = _outputs(theirs.double(), probe.double())
            if len(found) != len(exact):
                raise AccelerationError(f"the network returns {len(found)} tensors, and model {len(exact)}")
            for index, tensors in enumerate(zip(found, exact, eager, strict=True)):
                errors = accuracy(*tensors)
                # In float64 theirs is exact by definition, and ours sums in another order.
                exactly = errors.max_error <= 1e-9 * tensors[1].abs().max().item()
                if not (exactly if probe.dtype == torch.float64 else errors.passes()):
                    how = " with random layer scales and bias tables" if random else ""
                    raise AccelerationError(f"output {index}{how} is not that of model: {errors}")


def _copy(model: nn.Module) -> nn.Module:
    """A deep copy, also of timm's attention after a forward with gradients: it keeps an expanded bias."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, nn.SyncBatchNorm):  # a group of processes cannot be copied
            memo[id(module.process_group)] = module.process_group
        for value in vars(module).values():
            for tensor in value.values() if isinstance(value, dict) else (value,):
                if isinstance(tensor, Tensor) and not tensor.is_leaf:
                    memo[id(tensor)] = tensor.detach()
    return copy.deepcopy(model, memo)


def _randomise(model: nn.Module) -> None:
    """Fill the parameters that are nearly zero in new networks."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if _LAYER_SCALE.search(name):
            parameter.copy_(torch.empty(parameter.shape).uniform_(0.2, 0.8, generator=generator))
        elif _BIAS_TABLE.search(name):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def _outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """All tensors that `model` returns in eval mode, in order."""
    model.train()  # timm's and the original's attention keep their expanded bias in eval mode, and forget it here
    model.eval()
    if isinstance(model, EfficientFormer) and model.config.feature_norm is not None:
        return model.forward_intermediates(x, intermediates_only=True)
    return list(_tensors(model(x)))


def _tensors(output: Any) -> Iterable[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif output is not None:
        for item in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(item)
