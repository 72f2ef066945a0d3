"""effformer in timm's registry: checks of timm's own tests, and the functions that its users call."""

from __future__ import annotations

import importlib
import io
import sys
from pathlib import Path
from typing import Any

import fake_hub
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import effformer
from effformer import EfficientFormer, create_model, ops
from effformer.model.parts import DropPath
from effformer.testing import randomise

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit", "ignore:The TorchScript type system", "ignore:The nodes obtained"
)
# timm passes config fields on: a small network of every kind of part.
SMALL: dict[str, Any] = {
    "depths": (1, 1, 2, 2), "widths": (8, 12, 16, 24), "num_heads": 2, "key_dim": 4, "num_classes": 10
}  # fmt: skip


@pytest.fixture(name="timm", scope="module")
def _timm(timm: Any) -> Any:
    import effformer.timm

    assert effformer.timm.register_model is timm.models.register_model
    return timm


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("hub")
    fake_hub.write(cache)
    return cache


def weights_in(cache: Path) -> Path:
    (path,) = cache.glob("*/snapshots/*/model.safetensors")
    return path


def small(timm: Any, **kwargs: Any) -> Any:
    return randomise(timm.create_model("effformer_l1", **SMALL | kwargs)).double().eval()


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def assert_close(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert (got - want).abs().max() <= 1e-11 * want.abs().max()


@pytest.mark.parametrize("size", ["l1", "l3", "l7"])
def test_timms_tools_find_the_preprocessing_of_our_models(timm: Any, size: str) -> None:
    name = f"efficientformer_{size}"
    ours, theirs = create_model(name, device="meta"), timm.create_model(name, device="meta")
    found, expected = (timm.data.resolve_model_data_config(model) for model in (ours, theirs))
    assert found == expected
    assert found["crop_pct"] == 0.95
    assert effformer.Preprocessing.from_config(ours.pretrained_cfg) == effformer.Preprocessing()


# --- the registry -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["l1", "l3", "l7"])
def test_names_and_configurations_are_those_of_timms_own(timm: Any, size: str) -> None:
    assert timm.list_models("effformer*") == [f"effformer_{size}" for size in ("l1", "l3", "l7")]
    assert f"effformer_{size}.snap_dist_in1k" in timm.list_pretrained("effformer*")
    ours, theirs = (timm.get_pretrained_cfg(f"{name}_{size}").to_dict() for name in ("effformer", "efficientformer"))
    different = {key: (ours.get(key), theirs.get(key)) for key in {*ours, *theirs} if ours.get(key) != theirs.get(key)}
    assert different == {
        "architecture": (f"effformer_{size}", f"efficientformer_{size}"),
        "fixed_input_size": (False, True),  # any size will do
        "min_input_size": ((3, 32, 32), None),
    }
    model = timm.create_model(f"effformer_{size}", device="meta")
    assert isinstance(model, EfficientFormer)
    assert model.default_cfg is model.pretrained_cfg
    assert model.default_cfg["architecture"] == f"effformer_{size}"
    own = timm.create_model(f"efficientformer_{size}", device="meta")
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in own.state_dict().items()}
    for name in (model.default_cfg["first_conv"], *model.default_cfg["classifier"]):
        assert f"{name}.weight" in model.state_dict()


def test_keywords_reach_the_network(timm: Any) -> None:
    model = timm.create_model(
        "effformer_l1", drop_rate=0.1, proj_drop_rate=0.2, drop_path_rate=0.3, in_chans=4, num_classes=5, global_pool="",
        bias_resize="matrix-bilinear", backend="eager", dtype=torch.bfloat16, device="meta",
    )  # fmt: skip
    assert model.head_drop.p == 0.1
    assert model.stages[3].blocks[4].mlp.drop1.p == 0.2
    drop_path = model.stages[3].blocks[4].drop_path1
    assert isinstance(drop_path, DropPath)
    assert abs(drop_path.rate - 0.3) < 1e-12
    assert model.stem.conv1.weight.shape[1] == 4
    assert model.head.weight.shape[0] == 5
    assert model.global_pool == ""
    assert model.config.bias_resize == "matrix-bilinear"
    assert model.stages[0].blocks[0].backend == "eager"
    assert (model.head.weight.dtype, model.head.weight.device.type) == (torch.bfloat16, "meta")
    assert timm.create_model("effformer_l1", device="meta").stages[0].blocks[0].backend == "auto"
    assert timm.create_model("effformer_l1", scriptable=True, device="meta").stages[0].blocks[0].backend == "eager"


@pytest.mark.parametrize("keywords", [{"img_size": 256}, {"out_indices": (1,)}, {"drop_connect_rate": 0.1}], ids=str)
def test_nothing_is_ignored(timm: Any, keywords: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"{next(iter(keywords))}: unknown key"):
        timm.create_model("effformer_l1", **keywords)


def test_missing_timm_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm.models", None)
    monkeypatch.delitem(sys.modules, "effformer.timm", raising=False)
    with pytest.raises(ImportError, match='pip install "timm>='):
        importlib.import_module("effformer.timm")


# --- weights ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_pretrained_weights_are_adapted_as_timm_adapts_its_own(
    timm: Any, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same repository, offline."""
    fake_hub.use(hub, monkeypatch)
    for keywords in ({"in_chans": 1, "num_classes": 7}, {"in_chans": 5, "num_classes": 0}):
        ours, theirs = (
            timm.create_model(f"{name}_l1", pretrained=True, **keywords).state_dict()
            for name in ("effformer", "efficientformer")
        )
        assert list(ours) == list(theirs)
        for key in ours:
            drawn = key in ("head.weight", "head_dist.weight")
            assert torch.equal(ours[key], theirs[key]) != drawn, key
    with pytest.raises(OSError, match="(?i)hub|cache|offline"):
        timm.create_model("effformer_l3", pretrained=True)


def test_weights_of_a_file(timm: Any, hub: Path, tmp_path: Path) -> None:
    from effformer.checkpoints.formats import convert_state_dict

    state = safetensors.torch.load_file(weights_in(hub))
    original = tmp_path / "original.pth"
    torch.save({"model": convert_state_dict(state, "original")}, original)
    for keywords in (
        {"checkpoint_path": str(weights_in(hub))},
        {"checkpoint": str(original)},  # ours, in any naming
        {"pretrained": True, "pretrained_cfg_overlay": {"file": str(weights_in(hub))}},
        {"pretrained": True, "pretrained_cfg_overlay": {"file": str(original)}},
    ):
        loaded = timm.create_model("effformer_l1", **keywords).state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in state.items())
    with pytest.raises(RuntimeError, match="size mismatch"):
        timm.create_model("effformer_l1", num_classes=3, checkpoint_path=str(weights_in(hub)))


# --- what timm's tests ask of a model ---------------------------------------------------------------------------------


def test_forward_and_classifier(timm: Any) -> None:
    model = small(timm)
    x = draw(2, 3, 64, 96)
    assert model(x).shape == (2, 10)
    assert model(x).isfinite().all()
    assert model.forward_features(x).shape == (2, 6, model.num_features)
    features, intermediates = model.forward_intermediates(x)
    assert torch.equal(features, model.forward_features(x))
    info = timm.models.FeatureInfo(model.feature_info, len(model.feature_info))
    assert [tuple(i.shape[1:]) for i in intermediates] == [
        (channels, 64 // reduction, 96 // reduction)
        for channels, reduction in zip(info.channels(), info.reduction(), strict=True)
    ]
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 6, model.num_features)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_parameter_gets_a_gradient(timm: Any, checkpointing: bool) -> None:
    model = timm.create_model("effformer_l1", **SMALL | {"num_classes": 42}).train()
    model.set_grad_checkpointing(checkpointing)
    outputs = model(torch.randn(2, *model.default_cfg["min_input_size"]))
    outputs.mean().backward()
    assert outputs.shape == (2, 42)
    assert outputs.isfinite().all()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.fixture(scope="module")
def expected(timm: Any, hub: Path) -> tuple[Tensor, list[Tensor], Any]:
    """An image, and the features that timm's own network has of it."""
    with pytest.MonkeyPatch.context() as patch:
        fake_hub.use(hub, patch)
        theirs = timm.create_model("efficientformer_l1", pretrained=True, features_only=True, out_indices=(0, -2, -1))
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        return x, theirs.eval()(x), theirs.feature_info


@pytest.mark.parametrize("feature_cls", ["getter", "list", "dict", "hook", "fx"])
def test_features_are_those_of_timms_own(
    timm: Any, feature_cls: str, expected: tuple[Tensor, list[Tensor], Any], hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The getter makes a map of the last stage's tokens; the others hand them out, as they do of timm's own."""
    fake_hub.use(hub, monkeypatch)
    x, want, info = expected
    ours = timm.create_model(
        "effformer_l1", pretrained=True, features_only=True, feature_cls=feature_cls, out_indices=(0, -2, -1)
    ).eval()
    with torch.no_grad():
        got = ours(x)
    if feature_cls == "dict":
        assert list(got) == ["0", "-2", "-1"]
        got = list(got.values())
    if feature_cls != "getter":
        want = [*want[:2], want[2].flatten(2).mT]
    for one, other in zip(got, want, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= 1e-4 * other.abs().max()
    for about in ("channels", "reduction", "module_name"):
        assert getattr(ours.feature_info, about)() == getattr(info, about)()
    assert "classifier" not in ours.pretrained_cfg


def test_features_alone_are_pruned_and_normalised(timm: Any) -> None:
    features = small(timm, features_only=True, out_indices=(1,))
    assert not any(key.startswith(("model.stages.2", "model.head")) for key in features.state_dict())
    normalised = small(timm, features_only=True, feature_norm="tap")
    with torch.no_grad():
        for norm in normalised.model.feature_norms:
            norm.weight.fill_(1)
            norm.bias.zero_()
        assert all(abs(feature.mean()) < 1e-9 for feature in normalised(draw(1, 3, 64, 64)))
    with pytest.raises(ValueError, match="feature_cls: got 'hook', allowed is 'getter' with a feature_norm"):
        small(timm, features_only=True, feature_cls="hook", feature_norm="tap")


# --- FX and TorchScript -----------------------------------------------------------------------------------------------


def extractor(model: nn.Module) -> nn.Module:
    """The whole model as a graph, traced in both modes, as timm's tests have it."""
    from timm.models import get_notrace_functions, get_notrace_modules
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    tracer = {
        "leaf_modules": get_notrace_modules(), "autowrap_functions": get_notrace_functions(),
        "param_shapes_constant": True,
    }  # fmt: skip
    training, evaluating = (nodes[-1] for nodes in get_graph_node_names(model, tracer_kwargs=tracer))
    graphs = {"train_return_nodes": {training: "out"}, "eval_return_nodes": {evaluating: "out"}}
    return create_feature_extractor(model, **graphs, tracer_kwargs=tracer)


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_fx_forward_and_backward(timm: Any, backend: str) -> None:
    model = small(timm, backend=backend)
    traced, x = extractor(model), draw(2, 3, 64, 96)
    assert_close(traced(x)["out"], model(x))
    for network in (model, traced):
        network.train()
    want = model(x)
    got = traced(x)["out"]
    assert_close(got, want)  # batch statistics do not depend on running ones
    got.mean().backward()
    assert all(parameter.grad is not None for parameter in traced.parameters())


@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"bias_resize": "matrix-bicubic", "feature_norm": "inline", "act": "prelu"},
    ],
    ids=str,
)
def test_fx_to_torchscript(timm: Any, keywords: dict[str, Any]) -> None:
    """Of any size, after saving too; in training mode with batch statistics."""
    model = small(timm, scriptable=True, **keywords)
    scripted = torch.jit.script(extractor(model))
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    for size in ((64, 96), (50, 97)):
        x = draw(2, 3, *size)
        for module in (scripted, loaded):
            assert_close(module(x)["out"], model(x))
    graph = torch.fx.symbolic_trace(model.train())
    assert_close(torch.jit.script(graph)(x), model(x))


def test_a_graph_of_the_eager_backend_keeps_its_modes(timm: Any) -> None:
    """It holds the modules, which know whether they train; fused operations would have none."""
    model = small(timm, backend="eager", proj_drop_rate=0.5)
    traced, x = torch.fx.symbolic_trace(model), draw(4, 3, 64, 64)
    called = {node.target for node in traced.graph.nodes if node.op == "call_function"}
    assert not called & {ops.meta4d, ops.attention_mixer, ops.linear_mlp, ops.bias_attention}
    assert_close(traced(x), model(x))
    outputs = []
    for network in (model, traced):
        network.train()
        torch.manual_seed(1)
        outputs.append(network(x))
    assert_close(outputs[1], outputs[0])
    assert (outputs[0] - model.eval()(x)).abs().max() > 0.1
    assert_close(traced.eval()(x), model(x))


def test_scripted_stochastic_depth(timm: Any) -> None:
    model, x = small(timm, backend="eager", drop_path_rate=0.1, depths=(1, 1, 1, 1)).train(), draw(4, 3, 64, 64)
    kept = model.eval()(x)
    for module in model.train().modules():
        if isinstance(module, DropPath):
            module.rate = 1.0
    scripted = torch.jit.script(torch.fx.symbolic_trace(model))
    assert_close(scripted(x), model(x))
    assert (scripted(x) - kept).abs().max() > 0.1


def test_a_traced_network_checks_its_images(timm: Any) -> None:
    traced = torch.fx.symbolic_trace(small(timm, backend="eager"))
    with pytest.raises(ValueError, match=r"x: got shape \[3, 64, 64\], allowed is \[B, 3, H, W\]"):
        traced(draw(3, 64, 64))
    with pytest.raises(TypeError, match=r"x: got torch.float32, allowed is the network's torch.float64"):
        traced(torch.zeros(1, 3, 64, 64))
