"""Modules around networks, and networks that other tools changed: errors name the part, its class and the remedy."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

import effformer
from effformer import EfficientFormer, accelerate, build_backbone, explain, export, freeze, load_checkpoint, set_backend
from effformer.checkpoints.formats import CheckpointError

Narrow = Callable[..., EfficientFormer]
IMAGES = torch.zeros(1, 3, 64, 64)


class Trained(nn.Module):
    """As a training framework's module: the network under a name of the user's."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.student = network


class Holder:
    """No module, as timm's first ModelEma."""

    def __init__(self, network: nn.Module) -> None:
        self.ema = network


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "module": nn.DataParallel,
    "_orig_mod": torch.compile,
    "module._orig_mod": lambda network: AveragedModel(torch.compile(network)),  # type: ignore[arg-type]
    "student": Trained,
    "ema": Holder,
    "0": nn.Sequential,
}


def refused(error: type[Exception], message: str, *calls: Callable[[], object]) -> None:
    for call in calls:
        with pytest.raises(error, match=message) as raised:
            call()
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("path", WRAPPERS)
def test_errors_name_the_part_to_pass(narrow: Narrow, path: str) -> None:
    network = narrow(dtype=torch.float32)
    model = WRAPPERS[path](network)
    part = re.escape(f": pass its part {path!r}") + "$"
    refused(
        TypeError,
        f"^model: got {type(model).__name__}.*, allowed is an EfficientFormer or a Backbone of effformer{part}",
        lambda: freeze(model),
        lambda: export(model, "model.pt2"),
        lambda: explain(model, IMAGES),
        lambda: load_checkpoint(model, network.state_dict()),
    )
    refused(TypeError, f"^model: got {type(model).__name__}.*{part}", lambda: accelerate(model))


@pytest.mark.parametrize("path", WRAPPERS)
def test_what_lies_in_a_wrapper_may_be_another_librarys(timm: Any, path: str) -> None:
    with torch.device("meta"):
        theirs = timm.create_model("efficientformer_l1").eval()
    model = copy.copy(theirs) if path == "module._orig_mod" else theirs
    model = AveragedModel(torch.compile(model)) if path == "module._orig_mod" else WRAPPERS[path](model)
    refused(TypeError, f"of its part {path!r}$", lambda: freeze(model))
    refused(TypeError, f": pass its part {path!r}$", lambda: accelerate(model))


def test_a_backbone_and_an_adapter_within_a_wrapper(narrow: Narrow) -> None:
    """The outer of two parts is named: the inner would return something else."""
    from conftest import NETSPRESSO_L1

    from effformer.openmm import EffFormer

    backbone = build_backbone(NETSPRESSO_L1, task="detection").eval()
    refused(TypeError, ": pass its part 'module'$", lambda: freeze(nn.DataParallel(backbone)))
    refused(TypeError, ": pass its part '_orig_mod'$", lambda: freeze(torch.compile(backbone)))  # type: ignore[arg-type]
    refused(TypeError, ": pass its part 'module'$", lambda: freeze(nn.DataParallel(EffFormer().eval())))


def test_set_backend_reaches_into_wrappers(narrow: Narrow) -> None:
    network = narrow()
    set_backend(nn.DataParallel(network), "eager")
    assert {part.backend for part in network.modules() if hasattr(part, "backend")} == {"eager"}
    frozen = freeze(network)
    refused(
        TypeError, "^model: got Frozen, allowed is a module that holds blocks", lambda: set_backend(frozen, "eager")
    )  # type: ignore[arg-type]


def test_recorded_networks(narrow: Narrow) -> None:
    """They have the network's parts, and compute by a program."""
    network = narrow(dtype=torch.float32, backend="eager")
    program = torch.fx.symbolic_trace(network)
    for model in (program, torch.jit.script(program), torch.export.export(network, (IMAGES,)).module()):
        refused(
            TypeError,
            r"^model: got .* of torch\.(fx|jit), allowed .*: take the network that it was made from$",
            lambda model=model: freeze(model),
            lambda model=model: accelerate(model),
            lambda model=model: load_checkpoint(model, network.state_dict()),
        )
        refused(ValueError, "made from$", lambda model=model: set_backend(model, "eager"))


# --- changed modules --------------------------------------------------------------------------------------------------


class LoRA(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.scale = base, nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) * (1 + self.scale)


class OtherBatchNorm2d(nn.BatchNorm2d):
    pass


def _quantised(network: nn.Module) -> None:
    torch.ao.quantization.quantize_dynamic(network, {nn.Linear}, inplace=True)


def _observed(network: nn.Module) -> None:
    network.qconfig = torch.ao.quantization.get_default_qconfig("fbgemm")  # type: ignore[assignment]
    torch.ao.quantization.prepare(network, inplace=True)


def _adapted(network: nn.Module) -> None:
    network.set_submodule(place := "stages.3.blocks.2.token_mixer.qkv", LoRA(network.get_submodule(place)))  # type: ignore[arg-type]


def _normed(network: nn.Module) -> None:
    network.set_submodule("stem.norm2", OtherBatchNorm2d(network.get_submodule("stem.norm2").num_features).eval())  # type: ignore[arg-type]


def _halved(network: nn.Module) -> None:
    conv = network.get_submodule("stages.1.downsample.conv")
    conv.padding_mode = "reflect"  # type: ignore[assignment]


def _sparse(network: nn.Module) -> None:
    network.head.bias = nn.Parameter(torch.zeros(10).to_sparse())  # type: ignore[union-attr, assignment]


CHANGES: list[tuple[Callable[[nn.Module], Any], str]] = [
    (
        _quantised,
        "token_mixer.qkv' is a Linear of torch.ao, not a Linear: take the network as it was before it was quan",
    ),
    (_observed, "stem: submodule 'conv1' has hooks: take the network as it was before it was quantised"),
    (_adapted, "stages.3.blocks.2: submodule 'token_mixer.qkv' is a LoRA of test_wrappers, not a Linear"),
    (_normed, "submodule 'norm2' is a OtherBatchNorm2d of test_wrappers, not a BatchNorm2d: put an nn.BatchNorm2d of"),
    (_halved, "stages.1.downsample: submodule 'conv' has other settings .*padding_mode=reflect"),
    (_sparse, "head.bias is a Parameter in torch.sparse_coo, not an ordinary tensor"),
    (lambda net: nn.utils.parametrizations.weight_norm(net.head), "head is a ParametrizedLinear, .*remove_parametriza"),
    (lambda net: nn.utils.weight_norm(net.head), "head has hooks: torch.nn.utils.remove_weight_norm"),
    (lambda net: prune.l1_unstructured(net.head, "weight", 0.3), "head has hooks: .*prune.remove"),
    (lambda net: setattr(net, "head", nn.Sequential(net.head)), "head is a Sequential, not a Linear"),
    (lambda net: setattr(net.head_dist, "forward", net.head.forward), "head_dist has another forward"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES, ids=range(len(CHANGES)))
def test_errors_name_the_changed_part(
    narrow: Narrow, tmp_path: Path, change: Callable[[nn.Module], Any], message: str
) -> None:
    network = narrow(dtype=torch.float32)
    change(network)
    refused(ValueError, f"^model: .*{message}", lambda: freeze(network), lambda: export(network, tmp_path / "n.pt2"))
    explain(network, IMAGES)
    set_backend(network, "eager")


def test_a_stem_without_its_convolution(narrow: Narrow) -> None:
    network = narrow()
    network.stem = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4)).double()  # type: ignore[assignment]
    refused(ValueError, "^model: stem: it is a Sequential, not a Stem", lambda: freeze(network))


@pytest.fixture
def theirs(timm: Any) -> nn.Module:
    fields = {"depths": (1, 1, 2, 2), "embed_dims": (8, 12, 16, 24), "num_vit": 1, "num_classes": 10}
    return timm.models.efficientformer.EfficientFormer(**fields).eval()


@pytest.mark.parametrize("change", [change for change, _ in CHANGES], ids=range(len(CHANGES)))
def test_accelerate_raises_its_own_errors(theirs: nn.Module, change: Callable[[nn.Module], Any]) -> None:
    change(theirs)
    if change is _halved:  # its results show it
        with pytest.raises(effformer.AccelerationError, match="is not that of model"):
            accelerate(theirs)
        return
    part = "stem|token_mixer.qkv|head"
    with pytest.raises((TypeError, ValueError, CheckpointError), match=f"(?s)({part})"):
        accelerate(theirs)


def test_what_cannot_be_run(theirs: nn.Module) -> None:
    theirs.stages[1].downsample.conv.stride = (1, 1)  # type: ignore[union-attr, index]
    with pytest.raises(effformer.AccelerationError, match="^model: it cannot be run beside the new network: "):
        accelerate(theirs)


# --- SyncBatchNorm ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_synchronised_norms_are_frozen_and_exported(narrow: Narrow, tmp_path: Path) -> None:
    network, x = narrow(dtype=torch.float32), torch.randn(2, 3, 64, 48)
    wanted = network(x)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    assert (freeze(synchronised, torch.float32)(x) - wanted).abs().max() < 1e-4
    assert (synchronised(x) - wanted).abs().max() < 1e-5
    path = tmp_path / "n.pt2"
    export(synchronised, path, size=(64, 48))
    assert (torch.export.load(path).module()(x) - wanted).abs().max() < 1e-4
    for part in ("stem.norm1", "stages.2.downsample.norm", "stages.0.blocks.0.mlp.norm2"):
        synchronised.get_submodule(part).train()
        refused(ValueError, "BatchNorm uses batch statistics", lambda: freeze(synchronised))
        synchronised.eval()
    synchronised.stem.norm1 = nn.SyncBatchNorm(4, affine=False).eval()  # type: ignore[assignment]
    refused(ValueError, "stem: submodule 'norm1' has other settings .*affine=False", lambda: freeze(synchronised))


@torch.no_grad()
def test_synchronised_norms_are_carried_over(theirs: nn.Module) -> None:
    x = torch.randn(1, 3, 224, 224)
    wanted = theirs(x)
    theirs = nn.SyncBatchNorm.convert_sync_batchnorm(theirs).train()
    theirs.stages[1].downsample.norm.momentum = 0.7  # type: ignore[union-attr, index]
    theirs.stem.norm1.eval()  # type: ignore[union-attr]
    ours = accelerate(theirs)
    kinds = [type(module) for module in ours.modules() if "BatchNorm" in type(module).__name__]
    assert set(kinds) == {nn.SyncBatchNorm}
    norm = ours.get_submodule("stages.1.downsample.norm")
    assert (norm.momentum, norm.training, ours.get_submodule("stem.norm1").training) == (0.7, True, False)
    assert not {p.data_ptr() for p in ours.parameters()} & {p.data_ptr() for p in theirs.parameters()}
    assert (ours.eval()(x) - wanted).abs().max() < 1e-4 * wanted.abs().max()
