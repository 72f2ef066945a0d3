"""`effformer.accelerate`: the state that it takes from other libraries' instances, and its errors."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import seeded
import torch
from dialect_models import Original, Trainer
from safetensors import safe_open
from test_golden import GOLDEN, checkpoint
from test_timm import assert_equal
from torch import Tensor, nn

import effformer
from effformer import accelerate
from effformer.checkpoints import accelerate as acceleration
from effformer.model.netspresso import Backbone
from effformer.testing import randomise

NARROW: dict[str, Any] = {"depths": (1, 1, 2, 3), "widths": (8, 12, 16, 24), "num_vit": 2, "key_dim": 4}
Build = Callable[..., nn.Module]


def drawn(model: nn.Module) -> nn.Module:
    """With what `randomise` finds by the classes of ours: layer scales and bias tables by their names."""
    randomise(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if re.search(r"layer_scale_\d$|ls\d\.gamma$", name):
                parameter.uniform_(0.2, 0.8)
            elif "attention_biases" in name:
                parameter.normal_()
    return model.double()


@pytest.fixture
def narrow_timm(timm: Any) -> Build:
    def build(**kwargs: Any) -> nn.Module:
        fields = {"depths": (1, 1, 2, 3), "embed_dims": (8, 12, 16, 24), "num_vit": 2, "num_classes": 5}
        return drawn(timm.models.efficientformer.EfficientFormer(**fields | kwargs))

    return build


def original(**kwargs: Any) -> nn.Module:
    return drawn(Original(**NARROW | {"heads": 2, "num_classes": 5} | kwargs))


def trainer(**kwargs: Any) -> nn.Module:
    model = drawn(Trainer(**NARROW | {"heads": 2} | kwargs))
    index = effformer.reference.bias_index(7, 7)
    for name, buffer in model.named_buffers():
        if name.endswith("attention_bias_idxs"):
            buffer.copy_(index)
    return model


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The tensors that a model of any library returns, in order."""
    if isinstance(model, effformer.EfficientFormer) and model.config.feature_norm:
        return model.forward_intermediates(x, intermediates_only=True)
    out = model(x)
    if isinstance(out, dict):
        (out,) = out.values()
    return [out] if isinstance(out, Tensor) else list(out)


def images(size: tuple[int, int] = (224, 224)) -> Tensor:
    return torch.randn(2, 3, *size, dtype=torch.float64)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("snap_l1_classification_224", Original),
        ("snap_l1_dense_256x320", lambda: Original(dense=True, resolution=16)),
        ("netspresso_l1_classification_224", Trainer),
        ("netspresso_l1_segmentation_256x320", lambda: Trainer("segmentation")),
    ],
)
def test_the_stand_ins_are_what_they_stand_for(name: str, build: Callable[[], nn.Module]) -> None:
    model = build().double()
    state = checkpoint(name)
    index = {key: value for key, value in model.state_dict().items() if "bias_idxs" in key}
    if name.startswith("netspresso"):
        index = dict.fromkeys(index, effformer.reference.bias_index(7, 7))
    missing, unexpected = model.load_state_dict(state | index, strict=False)
    assert not unexpected
    assert all(key.endswith("num_batches_tracked") for key in missing)
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        batch, height, width, seed = (int(file.metadata()[key]) for key in ("batch", "height", "width", "seed"))
        expected = {key: file.get_tensor(key).double() for key in file.keys()}  # noqa: SIM118
    found = outputs(model.train().eval(), seeded.images(batch, height, width, seed))
    assert len(found) == len(expected)
    for got, key in zip(found, sorted(expected), strict=True):
        assert_equal(got, expected[key], 1e-7)


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("timm", (224, 224)),
        ("original", (224, 224)),
        ("dense", (160, 96)),
        ("classification", (224, 224)),
        ("classification", (96, 160)),
        ("detection", (160, 96)),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_same_outputs_gradients_and_statistics(
    narrow_timm: Build, kind: str, size: tuple[int, int], training: bool
) -> None:
    build = {
        "timm": narrow_timm,
        "original": original,
        "dense": lambda: original(dense=True, resolution=16),
        "classification": trainer,
        "detection": lambda: trainer(task="detection"),
    }
    theirs = build[kind]()
    theirs.train(training)
    ours = accelerate(theirs)
    assert isinstance(ours, Backbone) == (kind in ("classification", "detection"))
    x = images(size)
    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    got, want = outputs(ours, x_ours), outputs(theirs, x_theirs)
    assert (
        len(got) == len(want) == (4 if kind in ("dense", "detection") else 2 if kind == "original" and training else 1)
    )
    for one, other in zip(got, want, strict=True):
        assert_equal(one, other)
    probes = [torch.randn_like(one) for one in want]
    sum((one * probe).sum() for one, probe in zip(got, probes, strict=True)).backward()
    sum((one * probe).sum() for one, probe in zip(want, probes, strict=True)).backward()
    assert_equal(x_ours.grad, x_theirs.grad, 1e-10)

    network = ours.network if isinstance(ours, Backbone) else ours
    format = {"timm": "timm", "original": "original", "dense": "original-dense"}.get(kind, "netspresso")
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in theirs.named_parameters()
        if "_idxs" not in name
    }
    normalised = effformer.checkpoints.formats.normalise(gradients)
    assert normalised.format == format
    scale = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, parameter in network.named_parameters():
        cached = not training and format.startswith("original") and "biases" in name  # theirs has no gradient
        if parameter.grad is not None and not cached:
            assert (parameter.grad - normalised.state[name]).abs().max() <= 1e-10 * scale, name
    statistics = effformer.checkpoints.formats.normalise(theirs.state_dict()).state
    for name, buffer in network.named_buffers():
        if "running" in name:
            assert_equal(buffer, statistics[name])


def test_a_published_network_of_timms(timm: Any) -> None:
    theirs = timm.create_model("efficientformer_l1", num_classes=7, drop_path_rate=0.2, drop_rate=0.1).eval()
    before, seed = copy.deepcopy(theirs.state_dict()), torch.get_rng_state()
    kinds = {type(module): dict(vars(type(module))) for module in theirs.modules()}
    ours = accelerate(theirs)
    assert torch.equal(torch.get_rng_state(), seed)
    assert {kind: dict(vars(kind)) for kind in kinds} == kinds
    assert all(torch.equal(value, before[key]) for key, value in theirs.state_dict().items())
    assert not {p.data_ptr() for p in ours.parameters()} & {p.data_ptr() for p in theirs.parameters()}
    assert ours.config == effformer.config.PRESETS["efficientformer_l1"]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.default_cfg == theirs.default_cfg
    assert ours.head_drop.p == 0.1
    rates = [module.rate for module in ours.modules() if isinstance(module, effformer.model.parts.DropPath)]
    wanted = [module.drop_prob for module in theirs.modules() if hasattr(module, "drop_prob")]
    assert rates == wanted
    assert len(rates) == 28


def test_a_network_that_has_been_used(narrow_timm: Build) -> None:
    """In eval mode timm's attention keeps its expanded bias, with a gradient if there was one: it cannot be copied."""
    theirs, x = narrow_timm().eval(), images()
    theirs(x)
    kept = theirs.stages[3].blocks[2].token_mixer.attention_bias_cache["cpu"]
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(theirs)
    with torch.no_grad():
        theirs.stages[3].blocks[2].token_mixer.attention_biases.normal_()  # and what it keeps is stale now
    ours = accelerate(theirs)
    assert theirs.stages[3].blocks[2].token_mixer.attention_bias_cache["cpu"] is kept
    theirs.train().eval()
    assert_equal(ours(x), theirs(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_and_memory_format(narrow_timm: Build, dtype: torch.dtype) -> None:
    theirs = narrow_timm().to(dtype).to(memory_format=torch.channels_last).eval()
    ours = accelerate(theirs)
    assert {p.dtype for p in ours.parameters()} == {dtype}
    assert ours.stem.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert not ours.stem.conv2.weight.is_contiguous()
    assert accelerate(narrow_timm()).stem.conv2.weight.is_contiguous()


def test_modes_frozen_parts_and_settings(narrow_timm: Build) -> None:
    theirs = narrow_timm(drop_path_rate=0.2, proj_drop_rate=0.3, global_pool="", act_layer=nn.SiLU)
    theirs.train()
    theirs.stages[1].blocks[0].mlp.norm1.eval()
    theirs.stem.requires_grad_(False)
    theirs.stages[3].blocks[2].norm1.eps = 1e-3
    theirs.stages[0].blocks[0].mlp.norm2.momentum = 0.7
    theirs.set_distilled_training(True)
    theirs.set_grad_checkpointing(True)
    ours = accelerate(theirs, backend="eager")
    assert ours.training
    evaluating = [path for path, module in ours.named_modules() if not module.training]
    assert evaluating == ["stages.1.blocks.0.mlp.norm1"]
    assert {n for n, p in ours.named_parameters() if not p.requires_grad} == {
        n for n, p in theirs.named_parameters() if not p.requires_grad
    }
    assert not ours.stem.conv1.weight.requires_grad
    assert ours.stages[3].blocks[2].norm1.eps == 1e-3
    assert ours.stages[0].blocks[0].mlp.norm2.momentum == 0.7
    assert ours.config.act == "silu"
    assert ours.config.proj_drop == 0.3
    assert ours.global_pool == ""
    assert ours.distilled_training
    assert all(stage.grad_checkpointing for stage in ours.stages)
    assert {block.backend for block in ours.modules() if hasattr(block, "backend")} == {"eager"}


def test_dropouts_of_netspressos() -> None:
    model = trainer(drop=0.1, attention_drop=0.2, act=nn.Hardswish)
    model.encoder.blocks[6][2].token_mixer.query.requires_grad_(False)
    with pytest.raises(ValueError, match="query, key and value of .*qkv.weight differ in requires_grad"):
        accelerate(model)
    for part in ("key", "value"):
        getattr(model.encoder.blocks[6][2].token_mixer, part).requires_grad_(False)
    ours = accelerate(model)
    assert not ours.network.stages[3].blocks[2].token_mixer.qkv.weight.requires_grad
    assert ours.network.stages[3].blocks[2].token_mixer.proj.weight.requires_grad
    config = ours.network.config
    assert (config.proj_drop, config.attn_drop, config.act) == (0.1, 0.2, "hard_swish")


def test_the_constant_index_of_netspresso_is_no_bias() -> None:
    model = drawn(Trainer(**NARROW | {"heads": 2})).eval()
    with pytest.warns(UserWarning, match="is constant"):
        ours = accelerate(model)
    x = images()
    assert_equal(outputs(ours, x)[0], outputs(model, x)[0])
    assert ours.network.stages[3].blocks[2].token_mixer.attention_biases.requires_grad


@pytest.mark.parametrize("training", [False, True])
def test_one_head_stays_one(training: bool) -> None:
    theirs = original(distillation=False)
    theirs.train(training)
    ours = accelerate(theirs)
    assert ours.head is ours.head_dist
    x = images()
    got, want = outputs(ours, x)[0], outputs(theirs, x)[0]
    assert_equal(got, want)
    got.square().sum().backward()
    want.square().sum().backward()
    assert_equal(ours.head.weight.grad, theirs.head.weight.grad)


def test_pruned_networks_and_those_without_heads(narrow_timm: Build) -> None:
    x = images()
    for indices in ([1], [0, 3]):
        theirs = narrow_timm().eval()
        theirs.prune_intermediate_layers(indices, prune_norm=True)
        ours = accelerate(theirs)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert_equal(ours(x), theirs(x))
    theirs = narrow_timm(num_classes=0).eval()
    assert_equal(accelerate(theirs)(x), theirs(x))


def test_hidden_channels_that_are_no_multiple(narrow_timm: Build) -> None:
    theirs = narrow_timm(mlp_ratios=2.7).eval()
    x = images()
    assert_equal(accelerate(theirs)(x), theirs(x))


@pytest.mark.parametrize("fault", ["swapped layer scales", "another bias", "no mixer"])
def test_what_computes_something_else_is_refused(
    narrow_timm: Build, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a fresh network, whose layer scales of 1e-5 hide nearly every difference."""
    theirs = narrow_timm()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(1e-5)
            elif "attention_biases" in name:
                parameter.zero_()
    load = acceleration._load

    def broken(ours: nn.Module, model: nn.Module) -> None:
        load(ours, model)
        block = ours.stages[3].blocks[2]
        if fault == "swapped layer scales":
            block.ls1, block.ls2 = block.ls2, block.ls1
        elif fault == "another bias":
            block.token_mixer.attention_biases.data = block.token_mixer.attention_biases.data.flip(1)
        else:
            block.token_mixer.proj.weight.data.zero_()

    monkeypatch.setattr(acceleration, "_load", broken)
    with pytest.raises(effformer.AccelerationError, match="output 0 .*is not that of model: max"):
        accelerate(theirs.eval().float())


def test_refusals(narrow_timm: Build, narrow: Callable[..., effformer.EfficientFormer]) -> None:
    model = narrow_timm()
    for other, message in (
        (narrow(), "model: got a EfficientFormer of effformer"),
        (nn.Linear(1, 1), "model: got Linear, allowed is an EfficientFormer of timm, the original or NetsPresso$"),
        (nn.Sequential(nn.Identity(), model), "pass its part '1'"),
        (7, "model: got int"),
    ):
        with pytest.raises(TypeError, match=message):
            accelerate(other)
    with pytest.raises(TypeError, match="pass its part 'body'"):
        accelerate(nn.ModuleDict({"body": model}))

    hooked = copy.deepcopy(model)
    hooked.stages[2].register_forward_hook(lambda *args: None)
    changed = copy.deepcopy(model)
    changed.stages[2].forward = lambda x: x
    parametrised = copy.deepcopy(model)
    nn.utils.parametrizations.weight_norm(parametrised.head)
    for other in (hooked, changed, parametrised):
        with pytest.raises(ValueError, match="has hooks, parametrisations or another forward, allowed are none"):
            accelerate(other)
    mixed = copy.deepcopy(model)
    mixed.head.float()
    with pytest.raises(ValueError, match="got tensors of torch.float32 on cpu, torch.float64 on cpu"):
        accelerate(mixed)
    with pytest.raises(ValueError, match="meta"):
        accelerate(copy.deepcopy(model).to("meta"))
    activated = copy.deepcopy(model)
    activated.stages[0].blocks[0].mlp.act = nn.GELU(approximate="tanh")
    with pytest.raises(ValueError, match=r"stages.0.blocks.0.mlp.act is GELU\(approximate='tanh'\)"):
        accelerate(activated)
    pooled = copy.deepcopy(model)
    pooled.stages[0].blocks[0].token_mixer.pool = nn.AvgPool2d(5, stride=1, padding=2, count_include_pad=False)
    with pytest.raises(effformer.AccelerationError, match="output 0 is not that of model"):
        accelerate(pooled)
    with pytest.raises(ValueError, match="backend: got 'fast'"):
        accelerate(model, backend="fast")
    with pytest.raises(ValueError, match=r"probe: got \(3, 224, 224\) torch.float32 on cpu"):
        accelerate(model, probe=torch.zeros(3, 224, 224))
    more = copy.deepcopy(model)
    more.stages[0].blocks[0].extra = nn.Linear(2, 2).double()
    with pytest.raises(
        effformer.checkpoints.formats.CheckpointError, match=r"unexpected \(2\):\n  stages.0.blocks.0.extra.weight"
    ):
        accelerate(more)
