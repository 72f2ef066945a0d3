"""The network's interface."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_reference import draw

from effformer import EfficientFormer, EfficientFormerConfig, create_model
from effformer.model.blocks import Flat, Meta3D
from effformer.model.meta4d import Meta4D
from effformer.model.parts import DropPath
from effformer.testing import randomise

Narrow = Callable[..., EfficientFormer]


@torch.no_grad()
def test_forward_is_features_and_head(narrow: Narrow) -> None:
    network, x = narrow(), draw(2, 3, 64, 96)
    features = network.forward_features(x)
    assert features.shape == (2, 6, 24)
    pooled = network.forward_head(features, pre_logits=True)
    assert torch.equal(pooled, features.mean(1))
    want = (network.head(pooled) + network.head_dist(pooled)) / 2
    assert torch.equal(network.forward_head(features), want)
    assert torch.equal(network(x), want)
    assert not torch.allclose(network.head(pooled), network.head_dist(pooled))


def test_distilled_training_returns_the_pair(narrow: Narrow) -> None:
    network, features = narrow(), draw(2, 6, 24)
    network.set_distilled_training()
    assert isinstance(network.forward_head(features), torch.Tensor)
    network.train()
    pair = network.forward_head(features)
    assert isinstance(pair, tuple)
    assert [logits.shape for logits in pair] == [(2, 10), (2, 10)]
    network.set_distilled_training(False)
    assert isinstance(network.forward_head(features), torch.Tensor)


@torch.no_grad()
def test_intermediates(narrow: Narrow) -> None:
    network, x = narrow(), draw(2, 3, 64, 96)
    final, maps = network.forward_intermediates(x)
    assert torch.equal(final, network.forward_features(x))
    assert [tuple(m.shape[1:]) for m in maps] == [(8, 16, 24), (12, 8, 12), (16, 4, 6), (24, 2, 3)]
    out = network.stem(x)
    for stage, feature in zip(network.stages, maps, strict=True):
        out = stage(out)
        assert torch.equal(out if out.ndim == 4 else out.transpose(1, 2).reshape(feature.shape), feature)

    for indices, which in ((2, [2, 3]), ([0, -1], [0, 3]), ((1,), [1]), (None, [0, 1, 2, 3])):
        some = network.forward_intermediates(x, indices=indices, intermediates_only=True)
        assert all(torch.equal(one, maps[index]) for one, index in zip(some, which, strict=True))
    normed = network.forward_intermediates(x, norm=True, intermediates_only=True)
    assert torch.equal(normed[3].flatten(2).transpose(1, 2), final)
    assert torch.equal(normed[2], maps[2])


@torch.no_grad()
def test_stop_early_runs_no_further_stage(narrow: Narrow) -> None:
    network, x = narrow(), draw(1, 3, 64, 64)
    ran: list[int] = []
    for index, stage in enumerate(network.stages):
        stage.register_forward_hook(lambda *args, index=index: ran.append(index))
    final, maps = network.forward_intermediates(x, indices=[0, 1], stop_early=True)
    assert ran == [0, 1]
    assert torch.equal(final, maps[1])
    network.forward_intermediates(x, indices=[0, 1])
    assert ran == [0, 1, 0, 1, 2, 3]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"indices": 0}, "indices: got the last 0, allowed are 1 to 4"),
        ({"indices": 5}, "indices: got the last 5"),
        ({"indices": [4]}, r"indices: got \[4\], allowed are numbers from -4 to 3"),
        ({"indices": []}, "indices: got"),
        ({"output_fmt": "NHWC"}, "output_fmt: got 'NHWC'"),
    ],
)
def test_intermediates_refuse(narrow: Narrow, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        narrow().forward_intermediates(draw(1, 3, 32, 32), **kwargs)


def test_norm_and_feature_norm_exclude_each_other(narrow: Narrow) -> None:
    network = narrow(feature_norm="tap")
    with pytest.raises(ValueError, match="norm: got True, allowed is False with feature_norm='tap'"):
        network.forward_intermediates(draw(1, 3, 32, 32), norm=True)


@torch.no_grad()
def test_tapped_norms_leave_the_path_alone(narrow: Narrow) -> None:
    network, x = narrow(feature_norm="tap"), draw(1, 3, 64, 64)
    plain = narrow()
    plain.load_state_dict({k: v for k, v in network.state_dict().items() if not k.startswith("feature_norms")})
    assert torch.equal(network(x), plain(x))
    raw = plain.forward_intermediates(x, intermediates_only=True)
    for got, feature, norm in zip(
        network.forward_intermediates(x, intermediates_only=True), raw, network.feature_norms, strict=True
    ):
        assert torch.equal(got, norm(feature))
    inline = narrow(feature_norm="inline")
    inline.load_state_dict(network.state_dict())
    assert (inline(x) - plain(x)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(3, 64, 64), ValueError, r"x: got shape \[3, 64, 64\], allowed is \[B, 3, H, W\]"),
        (torch.zeros(1, 4, 64, 64), ValueError, r"x: got shape \[1, 4, 64, 64\], allowed is \[B, 3, H, W\]"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), TypeError, "x: got torch.uint8, allowed is a floating dtype"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.float32), TypeError, "x: got torch.float32, allowed is the network's torch.float64"),
    ],
)  # fmt: skip
def test_bad_images_are_named(narrow: Narrow, x: torch.Tensor, error: type[Exception], message: str) -> None:
    for call in (narrow().forward, narrow().forward_intermediates):
        with pytest.raises(error, match=message):
            call(x)


def test_autocast(narrow: Narrow) -> None:
    network = narrow(dtype=torch.float32)
    x = torch.randn(2, 3, 64, 64)
    want = network(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert network.stages[0].blocks[0].why_composed() is None
        got = network(x)
    assert got.dtype == torch.bfloat16
    assert 0 < (got.float() - want).abs().max() < 0.1 * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_networks(narrow: Narrow, dtype: torch.dtype) -> None:
    network, exact = narrow(dtype=dtype), narrow(dtype=torch.float64)
    exact.load_state_dict(network.state_dict())
    x = torch.randn(2, 3, 64, 64).to(dtype)
    with torch.no_grad():
        got, want = network(x), exact(x.double())
    assert got.dtype == dtype
    assert (got.double() - want).abs().max() < 64 * torch.finfo(dtype).eps * want.abs().max()


def test_heads_and_pools(narrow: Narrow) -> None:
    network, x = narrow(dtype=torch.bfloat16), torch.randn(2, 3, 64, 64).bfloat16()
    network.reset_classifier(3)
    head, head_dist = network.get_classifier()
    assert head.weight.shape == head_dist.weight.shape == (3, 24)
    assert head.weight.dtype == torch.bfloat16
    assert not head.training
    assert not torch.equal(head.weight, head_dist.weight)
    assert network(x).shape == (2, 3)
    network.reset_classifier(0)
    assert network(x).shape == (2, 24)
    network.reset_classifier(0, "")
    assert network(x).shape == (2, 4, 24)
    with pytest.raises(ValueError, match="global_pool: got 'max'"):
        network.reset_classifier(0, "max")
    with pytest.raises(ValueError, match="num_classes: got -1"):
        network.reset_classifier(-1)
    network.prune_intermediate_layers(2)
    network.prune_intermediate_layers([1])
    assert network(x).shape == (2, 12, 8, 8)
    with pytest.raises(ValueError, match="last stage was pruned"):
        network.reset_classifier(10, "avg")


@pytest.mark.parametrize("num_vit", [0, 1, 3])
def test_blocks_of_the_last_stage(narrow: Narrow, num_vit: int) -> None:
    network = narrow(depths=(1, 1, 1, 3), num_vit=num_vit)
    kinds = [type(block) for block in network.stages[3].blocks]
    assert kinds == [Meta4D] * (3 - num_vit) + [Flat] + [Meta3D] * num_vit
    x = draw(1, 3, 64, 96)
    assert network.forward_features(x).shape == (1, 6, 24)
    assert network.forward_intermediates(x, intermediates_only=True)[3].shape == (1, 24, 2, 3)


def test_other_channels_devices_and_dtypes() -> None:
    network = create_model("efficientformer_l1", in_chans=1, num_classes=2, dtype=torch.bfloat16).eval()
    assert network(torch.zeros(1, 1, 64, 64, dtype=torch.bfloat16)).shape == (1, 2)
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
    meta = create_model("efficientformer_l7", device="meta").eval()
    assert meta(torch.empty(4, 3, 640, 512, device="meta")).shape == (4, 1000)
    moved = create_model("efficientformer_l1", device="meta").to_empty(device="cpu")
    moved.load_state_dict(create_model("efficientformer_l1").state_dict())
    index = moved.stages[3].blocks[4].token_mixer.attention_bias_idxs
    assert index[0, 48] == 48
    with pytest.raises(TypeError, match="config: got dict, allowed is an EfficientFormerConfig"):
        EfficientFormer({})  # type: ignore[arg-type]


def test_layer_scale_starts_where_it_is_told(narrow: Narrow) -> None:
    for value in (1e-5, 0.3):
        network = create_model("efficientformer_l1", layer_scale_init_value=value)
        gammas = [parameter for name, parameter in network.named_parameters() if name.endswith("gamma")]
        assert len(gammas) == 30
        assert all(torch.equal(gamma, torch.full_like(gamma, value)) for gamma in gammas)


def test_stochastic_depth() -> None:
    drop, x = DropPath(0.25).train(), torch.ones(4000, 3, 2)
    out = drop(x)
    kept = out[:, 0, 0] != 0
    assert torch.equal(out, kept[:, None, None] * x / 0.75)  # a sample is kept or dropped as a whole
    assert abs(kept.double().mean() - 0.75) < 0.03
    assert torch.equal(drop.eval()(x), x)
    assert not DropPath(1.0).train()(x).any()


def test_drop_rate_acts_before_the_heads(narrow: Narrow) -> None:
    network, features = narrow(drop_rate=1.0).train(), draw(2, 4, 24)
    bias = (network.head.bias + network.head_dist.bias) / 2
    assert torch.allclose(network.forward_head(features), bias.expand(2, 10))
    assert not torch.allclose(network.eval().forward_head(features), bias.expand(2, 10))


def test_no_input_is_changed(narrow: Narrow) -> None:
    for training in (False, True):
        network, x = narrow().train(training), draw(2, 3, 64, 64)
        before = x.clone()
        network(x)
        network.forward_intermediates(x)
        assert torch.equal(x, before)
    features = draw(2, 4, 24)
    before = features.clone()
    network.forward_head(features)
    assert torch.equal(features, before)


def test_changed_weights_take_effect_at_once(narrow: Narrow) -> None:
    """In eval mode, however they change: nothing is cached. timm's bias was."""
    network, other, x = narrow(seed=1), narrow(seed=2), draw(1, 3, 64, 64)
    for key in [key for key, value in network.state_dict().items() if value.is_floating_point()]:
        before = network(x)
        with torch.no_grad():
            network.state_dict()[key].copy_(other.state_dict()[key])
        assert not torch.equal(network(x), before), key  # everything moves the logits ...
    assert torch.equal(network(x), other(x))  # ... until it is the other network

    network.load_state_dict(narrow(seed=3).state_dict())
    assert torch.equal(network(x), narrow(seed=3)(x))

    average = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=False
    ).eval()
    average.update_parameters(network)
    assert torch.equal(average(x), network(x))
    average.update_parameters(other)
    mean = copy.deepcopy(network)
    with torch.no_grad():
        for parameter, theirs in zip(mean.parameters(), other.parameters(), strict=True):
            parameter.lerp_(theirs, 0.5)
        for buffer, theirs in zip(mean.buffers(), other.buffers(), strict=True):
            buffer.copy_(theirs)  # AveragedModel takes the newest
    assert torch.allclose(average(x), mean(x), rtol=0, atol=1e-12)

    network(x)
    halved = network.float()
    fresh = narrow(seed=3, dtype=torch.float32)
    fresh.load_state_dict(halved.state_dict())
    assert torch.equal(halved(x.float()), fresh(x.float()))


def test_gradient_checkpointing_changes_nothing_but_memory(narrow: Narrow) -> None:
    x = draw(2, 3, 64, 96)
    for training in (False, True):
        plain = narrow(drop_path_rate=0.5, proj_drop_rate=0.2, attn_drop=0.2).train(training)
        recomputed = copy.deepcopy(plain)
        recomputed.set_grad_checkpointing()
        results = []
        for network in (plain, recomputed):
            torch.manual_seed(1)
            out = network(x)
            out.square().sum().backward()
            network.zero_grad()
            torch.manual_seed(2)  # a second step: statistics moved once a step, not once a computation
            network(x).square().sum().backward()
            results.append((out, [p.grad for p in network.parameters()], list(network.buffers())))
        (out, gradients, buffers), (out2, gradients2, buffers2) = results
        assert torch.equal(out, out2)
        for one, other in zip(gradients + buffers, gradients2 + buffers2, strict=True):
            assert torch.equal(one, other)
        assert all(m.momentum == 0.1 for m in recomputed.modules() if isinstance(m, torch.nn.BatchNorm2d))


def test_a_graph_can_be_walked_twice_with_checkpointing(narrow: Narrow) -> None:
    network = narrow().train()
    network.set_grad_checkpointing()
    loss = network(draw(2, 3, 64, 64)).sum()
    before = [buffer.clone() for buffer in network.buffers()]
    loss.backward(retain_graph=True)
    loss.backward()
    assert all(torch.equal(one, other) for one, other in zip(before, network.buffers(), strict=True))


def test_checkpointing_saves_memory() -> None:
    def saved_bytes(enable: bool) -> int:
        network = randomise(create_model("efficientformer_l1")).train()
        network.set_grad_checkpointing(enable)
        total = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            network(torch.randn(2, 3, 64, 64))
        return total

    assert saved_bytes(True) < 0.5 * saved_bytes(False)


def test_configs_are_kept(narrow: Narrow) -> None:
    network = create_model("efficientformer_l1", mlp_ratio=2, act="relu", proj_drop_rate=0.25, device="meta")
    assert network.config == EfficientFormerConfig(
        depths=(3, 2, 6, 4), widths=(48, 96, 224, 448), num_vit=1, mlp_ratio=2, act="relu", proj_drop=0.25
    )
    assert network.stages[0].blocks[0].mlp.fc1.weight.shape == (96, 48, 1, 1)
    uneven = narrow(value_ratio=2.5, num_heads=3, key_dim=6)
    assert uneven.stages[3].blocks[2].token_mixer.proj.weight.shape == (24, 3 * 15)
    assert uneven(draw(1, 3, 64, 64)).shape == (1, 10)
