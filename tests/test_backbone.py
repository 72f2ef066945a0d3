from __future__ import annotations

import copy

import pytest
import torch
from conftest import NETSPRESSO_L1
from torch import nn

from effformer import build_backbone
from effformer.config import ACTIVATIONS, DENSE_TASKS, TASKS
from effformer.model.blocks import Attention
from effformer.model.fusion import ACTIVATION_MODULES
from effformer.model.meta4d import ConvMlp
from effformer.model.parts import LayerScale
from effformer.testing import randomise


@pytest.mark.parametrize("task", TASKS)
def test_the_trainers_interface(task: str) -> None:
    backbone = build_backbone(NETSPRESSO_L1, task=task).eval()
    assert backbone.feature_dim == 448
    assert backbone.intermediate_features_dim == [48, 96, 224, 448]
    assert all(backbone.task_support(name) for name in (*TASKS, "Classification"))
    assert not backbone.task_support("tracking")
    with torch.no_grad():
        output = backbone(torch.randn(2, 3, 96, 160))
    if task == "classification":
        assert output.keys() == {"last_feature"}
        assert output["last_feature"].shape == (2, 448)
    else:
        assert output.keys() == {"intermediate_features"}
        shapes = [tuple(feature.shape) for feature in output["intermediate_features"]]
        assert shapes == [(2, 48, 24, 40), (2, 96, 12, 20), (2, 224, 6, 10), (2, 448, 3, 5)]


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(ValueError, match="task: got 'tracking'.*classification, segmentation"):
        build_backbone(NETSPRESSO_L1, task="tracking")


@torch.no_grad()
def test_inline_norm_feeds_the_next_stage_and_tap_does_not() -> None:
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    inline = randomise(build_backbone(NETSPRESSO_L1, task="detection", dtype=torch.float64)).eval()
    tap = build_backbone(NETSPRESSO_L1, task="detection", feature_norm="tap", dtype=torch.float64).eval()
    tap.load_state_dict(inline.state_dict())
    maps, tapped = (model(x)["intermediate_features"] for model in (inline, tap))
    assert torch.equal(maps[0], tapped[0])  # nothing came before the first norm
    for one, other in zip(maps[1:], tapped[1:], strict=True):
        assert (one - other).abs().max() > 0.05

    # By hand: each stage receives the map that was returned for the one before.
    network = inline.network
    for index, stage in enumerate(network.stages[1:], 1):
        out = stage(maps[index - 1])
        if index == 3:
            out = out.transpose(1, 2).reshape(maps[3].shape)
        assert torch.allclose(network.feature_norms[index](out), maps[index], rtol=0, atol=1e-12)


def test_defaults_are_the_trainers() -> None:
    for task in TASKS:
        config = build_backbone(NETSPRESSO_L1, task=task).network.config
        assert config.bias_resize == "matrix-bilinear"
        assert config.feature_norm == ("inline" if task in DENSE_TASKS else None)


def test_feature_norm_may_be_chosen() -> None:
    assert build_backbone(NETSPRESSO_L1, feature_norm="tap").network.config.feature_norm == "tap"
    assert build_backbone(NETSPRESSO_L1, task="detection", feature_norm=None).network.config.feature_norm is None
    with pytest.raises(ValueError, match="feature_norm: got 'bogus'"):
        build_backbone(NETSPRESSO_L1, feature_norm="bogus")


def test_initial_weights_are_drawn_as_the_trainer_draws_them() -> None:
    network = build_backbone(NETSPRESSO_L1).network
    for module in network.modules():
        match module:
            case ConvMlp():
                for conv in (module.fc1, module.fc2):
                    assert abs(conv.weight.std() - 0.02) < 0.002
                    assert not conv.bias.any()
            case nn.Linear():  # PyTorch's default: uniform within 1 / sqrt(in_features)
                bound = module.in_features**-0.5
                assert module.weight.abs().max() <= bound
                assert abs(module.weight.std() - bound / 3**0.5) < 0.05 * bound
                assert module.bias.any()
            case LayerScale():
                assert torch.equal(module.gamma, torch.full_like(module.gamma, 1e-5))
            case Attention():
                assert not module.attention_biases.any()


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_activation_of_the_trainers_registry(act: str) -> None:
    assert set(ACTIVATION_MODULES) == set(ACTIVATIONS)
    source = copy.deepcopy(NETSPRESSO_L1)
    source["params"]["ffn_act_type"] = act
    source["stage_params"] = [{"num_blocks": 2, "channels": width} for width in (8, 12, 16, 24)]
    network = randomise(build_backbone(source, dtype=torch.float64).network).eval()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    expected = {
        "gelu": lambda h: 0.5 * h * (1 + torch.erf(h / 2**0.5)),
        "relu": lambda h: h.clamp_min(0),
        "silu": lambda h: h / (1 + torch.exp(-h)),
        "swish": lambda h: h / (1 + torch.exp(-h)),
        "hard_swish": lambda h: h * (h + 3).clamp(0, 6) / 6,
        "relu6": lambda h: h.clamp(0, 6),
        "leaky_relu": lambda h: torch.where(h > 0, h, 0.01 * h),
    }
    with torch.no_grad():
        out = network.forward_features(x)
        for module in network.modules():
            if hasattr(module, "act"):
                slope = module.act.weight.item() if act == "prelu" else 0.0
                by_hand = nn.Module()
                by_hand.forward = (lambda h, a=slope: torch.where(h > 0, h, a * h)) if act == "prelu" else expected[act]
                module.act = by_hand
        assert torch.allclose(network.forward_features(x), out, rtol=0, atol=1e-12)


def test_prelu_has_one_weight_for_each_activation() -> None:
    source = copy.deepcopy(NETSPRESSO_L1)
    source["params"]["ffn_act_type"] = "prelu"
    weights = [m.weight for m in build_backbone(source).modules() if isinstance(m, nn.PReLU)]
    assert len(weights) == 3 + 2 + 6 + 4
    assert all(weight.tolist() == [0.25] for weight in weights)


def test_dropout_acts_where_the_trainer_lets_it() -> None:
    source = copy.deepcopy(NETSPRESSO_L1)
    source["params"] |= {"attention_dropout_prob": 0.25, "ffn_dropout_prob": 0.125}
    network = build_backbone(source).network
    rates = {name: module.p for name, module in network.named_modules() if isinstance(module, nn.Dropout) and module.p}
    attention, mlp = "stages.3.blocks.4.token_mixer", "stages.3.blocks.4.mlp"
    assert {name: rates.pop(f"{attention}.{name}") for name in ("attn_drop", "proj_drop")} == {
        "attn_drop": 0.25,
        "proj_drop": 0.25,
    }
    assert {rates.pop(f"{mlp}.drop1"), rates.pop(f"{mlp}.drop2")} == {0.125}
    assert set(rates.values()) == {0.125}
    assert len(rates) == 14


@torch.no_grad()
def test_dropout_does_what_it_says_at_each_site() -> None:
    """With certain dropout, all that comes before its site is gone; with next to none, nothing is."""
    network = randomise(build_backbone(NETSPRESSO_L1, dtype=torch.float64).network).train()
    tokens, feature = torch.randn(2, 6, 448, dtype=torch.float64), torch.randn(2, 448, 2, 3, dtype=torch.float64)
    mixer, mlp, conv_mlp = (
        network.get_submodule(f"stages.3.blocks.{name}") for name in ("4.token_mixer", "4.mlp", "0.mlp")
    )
    for norm in (conv_mlp.norm1, conv_mlp.norm2):
        norm.eval()
    mixer_out = mixer.eval()(tokens, 2, 3)
    mixer.train()

    mixer.attn_drop.p = 1.0
    assert torch.allclose(mixer(tokens, 2, 3), mixer.proj.bias.expand(2, 6, 448))
    mixer.attn_drop.p, mixer.proj_drop.p = 0.0, 1.0
    assert not mixer(tokens, 2, 3).any()
    mixer.attn_drop.p, mixer.proj_drop.p = 1e-12, 0.0
    assert mixer.why_composed() is not None
    assert torch.allclose(mixer(tokens, 2, 3), mixer_out, rtol=0, atol=1e-9)
    mixer.attn_drop = torch.nn.Identity()
    assert torch.allclose(mixer(tokens, 2, 3), mixer_out, rtol=0, atol=1e-12)

    mlp.drop1.p = 1.0
    assert torch.allclose(mlp(tokens), mlp.fc2.bias.expand(2, 6, 448))
    mlp.drop1.p, mlp.drop2.p = 0.0, 1.0
    assert not mlp(tokens).any()

    conv_mlp.drop.p = 1.0
    assert not conv_mlp(feature).any()
    seen: list[torch.Tensor] = []
    conv_mlp.fc2.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    conv_mlp(feature)
    assert not seen[0].any()
    conv_mlp.drop.p = 0.0
    conv_mlp(feature)
    assert seen[1].any()
