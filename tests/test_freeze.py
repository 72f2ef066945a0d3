"""The serving form on a CPU: its results, and what it keeps of a model. See gpu/test_gpu_frozen.py."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from effformer.kernels.launch import recorded
from frozen_results import MEAN, STD, close, live, normalised
from machine import DEVICE, DTYPES, id_of
from torch import Tensor

import effformer
from effformer import EfficientFormer, freeze
from effformer.model.netspresso import Backbone
from effformer.testing import Accuracy, accuracy, randomise

# --- what it computes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["logits", "pooled", "features"])
@pytest.mark.parametrize("feature_norm", [None, "tap", "inline"])
def test_it_computes_what_the_live_network_does(
    narrow: Callable[..., EfficientFormer], feature_norm: str | None, output: Any
) -> None:
    model, x = narrow(feature_norm=feature_norm), torch.randn(2, 3, 65, 90, dtype=torch.float64)
    frozen = freeze(model, torch.float64, output=output)
    close(frozen(x), live(model, output, x))
    close(frozen(x.to(memory_format=torch.channels_last)), live(model, output, x))


@pytest.mark.parametrize("feature_norm", [None, "tap", "inline"])
def test_maps_are_channels_last(
    narrow: Callable[..., EfficientFormer], feature_norm: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, PyTorch's GroupNorm always returns contiguous maps."""
    group_norm = torch.nn.functional.group_norm
    monkeypatch.setattr(torch.nn.functional, "group_norm", lambda *args: group_norm(*args).contiguous())
    frozen = freeze(narrow(feature_norm=feature_norm), torch.float64, output="features")
    for found in frozen(torch.randn(2, 3, 96, 64, dtype=torch.float64)):
        assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "overrides",
    [
        {"act": "hard_swish"},
        {"act": "leaky_relu"},
        {"num_vit": 0},
        {"num_vit": 2},
        {"in_chans": 5},
        {"bias_resize": "matrix-bicubic", "table_resolution": 4},
    ],
    ids=str,
)
def test_other_architectures(narrow: Callable[..., EfficientFormer], overrides: dict[str, Any]) -> None:
    model = narrow(**overrides)
    x = torch.randn(1, overrides.get("in_chans", 3), 96, 64, dtype=torch.float64)
    close(freeze(model, torch.float64)(x), live(model, "logits", x))


def test_a_backbone_and_a_pruned_network(narrow: Callable[..., EfficientFormer]) -> None:
    model, x = narrow(), torch.randn(1, 3, 64, 64, dtype=torch.float64)
    backbone = Backbone(model, "segmentation").eval()
    close(freeze(backbone, torch.float64, output="features")(x), list(backbone(x)["intermediate_features"]))
    model.prune_intermediate_layers([1])
    frozen = freeze(model, torch.float64, output="features")
    close(frozen(x), live(model, "features", x))
    with pytest.raises(ValueError, match="output: got 'pooled', allowed is 'features'"):
        freeze(model, torch.float64, output="pooled")


def test_pixels_in_either_order(narrow: Callable[..., EfficientFormer]) -> None:
    """Borders too: padding is zero in normalised images, which is the mean in pixels."""
    model = narrow()
    pixels = torch.randint(0, 256, (2, 3, 37, 50), dtype=torch.uint8)
    frozen = freeze(model, torch.float64, mean=MEAN, std=STD)
    expected = live(model, "logits", normalised(pixels))
    close(frozen(pixels), expected)
    close(frozen(pixels.permute(0, 2, 3, 1).contiguous()), expected)
    close(frozen(normalised(pixels)), expected)
    tensors = [torch.tensor(values, dtype=torch.float64) for values in (MEAN, STD)]
    close(freeze(model, torch.float64, mean=tensors[0], std=tensors[1].numpy())(pixels), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("dtype", [*DTYPES, pytest.param(torch.bfloat16, id="eager only")], ids=id_of)
def test_accuracy_in_low_precision(narrow: Callable[..., EfficientFormer], dtype: torch.dtype, backend: str) -> None:
    """By the rule: against float64, beside the live network's own error."""
    if backend == "triton" and dtype not in DTYPES:
        pytest.skip("the interpreter has no bfloat16")
    model = narrow(widths=(16, 24, 40, 56), depths=(1, 1, 2, 2)).to(DEVICE)
    pixels = torch.randint(0, 256, (3, 3, 64, 96), dtype=torch.uint8, device=DEVICE)
    x = normalised(pixels.cpu(), dtype).to(DEVICE)
    exact = live(model, "features", x.double())
    low = EfficientFormer(model.config, num_classes=10, dtype=dtype, device=DEVICE).eval()
    low.load_state_dict(model.state_dict())
    effformer.set_backend(low, "eager")
    frozen = freeze(model, dtype, output="features", mean=MEAN, std=STD, backend=backend)
    assert frozen.backend == backend
    for images in (x, pixels):
        for found, eager, true in zip(frozen(images), live(low, "features", x), exact, strict=True):
            rule(found, true, eager)


def test_l1_by_the_shipped_tiles() -> None:
    """From pixels to logits, in float16; few rows, whose MLPs are split."""
    model = randomise(effformer.create_model("efficientformer_l1"), seed=1).eval().to(DEVICE)
    pixels = torch.randint(0, 256, (1, 64, 32, 3), dtype=torch.uint8, device=DEVICE)
    low = randomise(effformer.create_model("efficientformer_l1", backend="eager"), seed=1).eval().to(DEVICE).half()
    x = normalised(pixels.cpu().permute(0, 3, 1, 2)).to(DEVICE)
    with torch.no_grad():
        eager = low(x.half())
    frozen = freeze(model, torch.float16, backend="triton", mean=MEAN, std=STD)
    with recorded() as launches:
        found = frozen(pixels)
    assert {"split_mlp_kernel", "head_kernel", "conv_norm_kernel"} <= {one.kernel.__name__ for one in launches}
    launches.clear()
    exact = model.double()
    effformer.set_backend(exact, "eager")
    with torch.no_grad():
        assert rule(found, exact(x), eager).max_error > 0


def rule(found: Tensor, exact: Tensor, eager: Tensor) -> Accuracy:
    result = accuracy(found, exact, eager)
    assert result.passes(), result
    return result


# --- a snapshot -------------------------------------------------------------------------------------------------------


def test_it_is_a_snapshot_until_it_is_refreshed(narrow: Callable[..., EfficientFormer]) -> None:
    model, x = narrow(), torch.randn(1, 3, 64, 64, dtype=torch.float64)
    before = live(model, "logits", x)
    with torch.inference_mode():
        frozen = freeze(model, torch.float64, mean=MEAN, std=STD)
        close(frozen(x).clone(), before)  # type: ignore[union-attr]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    randomise(model, seed=1)
    close(frozen(x), before)
    frozen.refresh()
    close(frozen(x), live(model, "logits", x))
    pixels = torch.randint(0, 256, (1, 3, 40, 64), dtype=torch.uint8)
    close(frozen(pixels), live(model, "logits", normalised(pixels)))
    assert all(not torch.equal(value, state[name]) for name, value in model.state_dict().items() if "gamma" in name)

    other = narrow(seed=2)
    frozen.refresh(other)
    close(frozen(x), live(other, "logits", x))
    randomise(other, seed=3)
    frozen.refresh()  # from the last one given
    close(frozen(x), live(other, "logits", x))
    with pytest.raises(ValueError, match="another architecture"):
        frozen.refresh(narrow(depths=(1, 1, 3, 2)))
    del model, other
    gc.collect()
    with pytest.raises(ValueError, match="no longer exists"):
        frozen.refresh()


def test_weights_from_another_device(narrow: Callable[..., EfficientFormer]) -> None:
    """Such as of a model that was moved to make room. The meta device stands in for the other one."""
    model = narrow().to("meta")
    frozen = freeze(model, torch.float64)
    frozen.refresh(narrow(seed=1))
    assert {tensor.device.type for tensor in frozen._packed.tensors()} == {"meta"}
    with pytest.raises(ValueError, match="another architecture"):
        frozen.refresh(narrow(depths=(1, 1, 3, 2)))


def test_it_keeps_no_tensor_of_the_model_and_changes_none(narrow: Callable[..., EfficientFormer]) -> None:
    """Not even of a model that has its dtype and layout already."""
    model, x = narrow(dtype=torch.float32).to(memory_format=torch.channels_last), torch.randn(1, 3, 64, 64)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    frozen = freeze(model, torch.float32)
    before = frozen(x)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
        value.zero_()
    assert torch.equal(frozen(x), before)  # type: ignore[arg-type]


def test_biases_of_few_sizes_are_kept(narrow: Callable[..., EfficientFormer]) -> None:
    frozen = freeze(narrow(), torch.float64)
    for side in range(1, 12):
        frozen(torch.zeros(1, 3, 32, 32 * side, dtype=torch.float64))
    assert list(frozen._plans._sizes) == [(32, 32 * side) for side in range(4, 12)]


@pytest.mark.parametrize("deterministic", [True, False])
def test_every_mlp_is_told_whether_to_be_deterministic(
    narrow: Callable[..., EfficientFormer], deterministic: bool
) -> None:
    steps = freeze(narrow(), deterministic=deterministic)._packed.steps
    told = [step.options.get("deterministic") for step in steps if step.operation in ("meta4d", "linear_mlp")]
    assert told == [deterministic] * 6


def test_autocast_does_not_reach_it(narrow: Callable[..., EfficientFormer]) -> None:
    model, x = narrow(), torch.randn(1, 3, 64, 64)
    frozen = freeze(model, torch.float32)
    before = frozen(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(frozen(x), before)  # type: ignore[arg-type]


def test_threads(narrow: Callable[..., EfficientFormer]) -> None:
    """Calls, and new weights between them: each result belongs to one set of weights."""
    models = [narrow(seed=seed) for seed in (0, 1)]
    images = [torch.randn(1, 3, 32 + 8 * i, 64, dtype=torch.float64) for i in range(3)]
    frozen = freeze(models[0], torch.float64)
    allowed = [[live(model, "logits", x)[0] for model in models] for x in images]
    wrong: list[int] = []

    def call(index: int) -> None:
        for _ in range(10):
            found = frozen(images[index])
            if min((found - one).abs().max().item() for one in allowed[index]) > 1e-10:  # type: ignore[operator]
                wrong.append(index)

    threads = [threading.Thread(target=call, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for step in range(10):
        frozen.refresh(models[step % 2])
    for thread in threads:
        thread.join()
    assert not wrong
