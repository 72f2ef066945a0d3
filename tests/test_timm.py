"""Live parity with timm: keys, values, gradients, and the tools that take a timm model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effformer import EfficientFormer, create_model, list_models
from effformer.testing import randomise


def pair(timm: Any, name: str, **kwargs: Any) -> tuple[EfficientFormer, nn.Module]:
    """Ours and timm's network in float64 with the same randomised weights."""
    ours = randomise(create_model(name, **kwargs)).double()
    with torch.device("meta"):  # random numbers for weights that are replaced took a third of the time
        theirs = timm.create_model(name, **kwargs)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()), strict=True, assign=True)  # shares no memory with ours
    return ours, theirs


def assert_equal(got: Tensor, want: Tensor, tolerance: float = 1e-11) -> None:
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tolerance * want.abs().max().clamp_min(1e-30)


@pytest.mark.parametrize("name", list_models())
def test_same_outputs_and_keys(timm: Any, name: str) -> None:
    ours, theirs = pair(timm, name)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [p.shape for p in ours.parameters()] == [p.shape for p in theirs.parameters()]
    fresh = create_model(name, device="meta")
    fresh.load_state_dict(theirs.state_dict(), strict=True, assign=True)

    x = torch.randn(1 if name == "efficientformer_l7" else 2, 3, 224, 224, dtype=torch.float64)
    with torch.no_grad():
        ours.eval(), theirs.eval(), fresh.eval()
        want, want_maps = theirs.forward_intermediates(x)
        got, got_maps = fresh.forward_intermediates(x)
        assert_equal(got, want)
        for got_map, want_map in zip(got_maps, want_maps, strict=True):
            assert_equal(got_map, want_map)
        assert_equal(ours(x), theirs(x))
        assert_equal(ours.forward_features(x), theirs.forward_features(x))
        assert_equal(ours.forward_head(got, pre_logits=True), theirs.forward_head(want, pre_logits=True))


@pytest.mark.parametrize(
    ("name", "training"),
    [
        ("efficientformer_l1", False),
        ("efficientformer_l1", True),
        ("efficientformer_l3", True),
        ("efficientformer_l7", False),
    ],
)
def test_same_gradients_and_statistics(timm: Any, name: str, training: bool) -> None:
    # Every kind of block, at the widths of the network; test_same_outputs_and_keys has all of its blocks.
    depths = {"efficientformer_l3": {"depths": (1, 1, 2, 6)}, "efficientformer_l7": {"depths": (1, 1, 2, 8)}}
    ours, theirs = pair(timm, name, **depths.get(name, {}))
    ours.train(training), theirs.train(training)
    batch = 1 if name == "efficientformer_l7" else 2
    x = torch.randn(batch, 3, 224, 224, dtype=torch.float64)
    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    probe = torch.randn(batch, 1000, dtype=torch.float64)
    (ours(x_ours) * probe).sum().backward()
    (theirs(x_theirs) * probe).sum().backward()

    # A bias before a BatchNorm in training has no gradient but rounding: compare on the network's scale.
    scale = max(float(p.grad.abs().max()) for p in theirs.parameters() if p.grad is not None)
    for (name, got), want in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert got.grad is not None, name
        assert (got.grad - want.grad).abs().max() <= 1e-11 * scale, name
    assert_equal(x_ours.grad, x_theirs.grad, 1e-10)
    statistics = dict(theirs.named_buffers())
    for name, got in ours.named_buffers():
        assert_equal(got.double(), statistics.pop(name).double())
    assert all(name.endswith("attention_bias_idxs") for name in statistics)


def test_same_heads_in_distilled_training(timm: Any) -> None:
    ours, theirs = pair(timm, "efficientformer_l1", num_classes=7)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    features = ours.eval().forward_features(x)  # timm takes 224 only: compare the heads on the same features
    for model in (ours, theirs):
        model.train()
        model.set_distilled_training(True)
    got, want = ours.forward_head(features), theirs.forward_head(features)
    assert isinstance(got, tuple)
    for one, other in zip(got, want, strict=True):
        assert_equal(one, other)
    assert not torch.equal(got[0], got[1])
    ours.eval(), theirs.eval()
    assert_equal(ours.forward_head(features), theirs.forward_head(features))


def test_same_stochastic_depth_and_dropout_rates(timm: Any) -> None:
    rates = {"drop_path_rate": 0.3, "proj_drop_rate": 0.2, "drop_rate": 0.1}
    ours = create_model("efficientformer_l3", **rates)
    theirs = timm.create_model("efficientformer_l3", **rates)

    def found(model: nn.Module) -> dict[str, float]:
        named = {name: getattr(m, "drop_prob", getattr(m, "rate", None)) for name, m in model.named_modules()}
        dropouts = {name: m.p for name, m in model.named_modules() if isinstance(m, nn.Dropout)}
        return {name: rate for name, rate in (named | dropouts).items() if rate}

    got, want = found(ours), found(theirs)
    assert got.keys() == want.keys()
    assert all(abs(got[name] - want[name]) < 1e-6 for name in want)
    assert any("drop_path" in name for name in want)
    assert "head_drop" in want


def test_same_answers_about_the_model(timm: Any) -> None:
    ours, theirs = create_model("efficientformer_l3"), timm.create_model("efficientformer_l3")
    assert ours.no_weight_decay() == theirs.no_weight_decay()
    assert len(ours.no_weight_decay()) == 4
    assert [dict(info) for info in theirs.feature_info] == ours.feature_info
    assert ours.num_features == theirs.num_features == ours.head_hidden_size
    assert [type(m) for m in ours.get_classifier()] == [type(m) for m in theirs.get_classifier()]

    from timm.models import group_parameters

    assert group_parameters(ours, ours.group_matcher()) == group_parameters(theirs, theirs.group_matcher())


def test_same_pruning(timm: Any) -> None:
    ours, theirs = pair(timm, "efficientformer_l1")
    ours.eval(), theirs.eval()
    x = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    for indices, kwargs in (([0, -2], {}), (2, {"prune_norm": True})):
        one, other = copy.deepcopy(ours), copy.deepcopy(theirs)
        assert one.prune_intermediate_layers(indices, **kwargs) == other.prune_intermediate_layers(indices, **kwargs)
        assert [p.shape for p in one.parameters()] == [p.shape for p in other.parameters()]
        got = one.forward_intermediates(x, indices=indices, intermediates_only=True)
        want = other.forward_intermediates(x, indices=indices, intermediates_only=True)
        for got_map, want_map in zip(got, want, strict=True):
            assert_equal(got_map, want_map)
        assert_equal(one(x), other(x))
        assert one.num_features == other.num_features


def test_timm_feature_extraction_and_optimiser_take_our_model(timm: Any) -> None:
    ours = randomise(create_model("efficientformer_l1")).eval()
    x = torch.randn(1, 3, 96, 64)
    want = ours.forward_intermediates(x, indices=[1, 3], intermediates_only=True)

    from timm.models._features import FeatureGetterNet

    with torch.no_grad():
        getter = FeatureGetterNet(copy.deepcopy(ours), out_indices=(1, 3))
        for got_map, want_map in zip(getter(x), want, strict=True):
            assert torch.equal(got_map, want_map)
    assert getter.feature_info.channels() == [96, 448]
    assert getter.feature_info.reduction() == [8, 32]

    from timm.optim import param_groups_layer_decay

    groups = param_groups_layer_decay(ours, weight_decay=0.1, layer_decay=0.5)
    assert sum(len(group["params"]) for group in groups) == len(list(ours.parameters()))
    assert len({group["lr_scale"] for group in groups}) == 6  # stem, four stages, heads
