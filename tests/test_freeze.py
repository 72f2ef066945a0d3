"""The serving form on a CPU; CUDA graphs by a stand-in that records what a graph would. See gpu/test_gpu_frozen.py."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from effformer.kernels.launch import recorded
from machine import DEVICE, DTYPES, id_of
from torch import Tensor, nn

import effformer
from effformer import EfficientFormer, EfficientFormerConfig, freeze
from effformer.ops import UnsupportedError
from effformer.serving import frozen as inference
from effformer.testing import Accuracy, accuracy, randomise

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def live(model: EfficientFormer, output: str, x: Tensor) -> list[Tensor]:
    """The live model's result for an output."""
    with torch.no_grad():
        match output:
            case "logits":
                return [model(x)]
            case "pooled":
                return [model.forward_head(model.forward_features(x), pre_logits=True)]
            case _:
                return model.forward_intermediates(x, intermediates_only=True)


def listed(result: Tensor | list[Tensor]) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else result


def close(found: Tensor | list[Tensor], expected: Tensor | list[Tensor], relative: float = 1e-12) -> None:
    found, expected = listed(found), listed(expected)
    assert [f.shape for f in found] == [e.shape for e in expected]
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= relative * other.abs().max()


def normalised(pixels: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """uint8 [B, C, H, W] -> images for the live network."""
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (MEAN, STD))
    return ((pixels.double() / 255 - mean) / std).to(dtype)


# --- what it computes -----------------------------------------------------------------------------------------------------


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
    backbone = effformer.model.netspresso.Backbone(model, "segmentation").eval()
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


# --- what it refuses ------------------------------------------------------------------------------------------------------


def test_bad_arguments(narrow: Callable[..., EfficientFormer]) -> None:
    model = narrow()
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (TypeError, "dtype: got torch.int8", {"dtype": torch.int8}),
        (ValueError, "output: got 'maps'", {"output": "maps"}),
        (ValueError, "when_full: got 'wait'", {"when_full": "wait"}),
        (ValueError, "backend: got 'cuda'", {"backend": "cuda"}),
        (ValueError, "max_graphs: got -1", {"max_graphs": -1}),
        (ValueError, "std: got None", {"mean": MEAN}),
        (ValueError, "mean: got None", {"std": STD}),
        (ValueError, "mean: got \\(0.5,\\)", {"mean": (0.5,), "std": STD}),
        (ValueError, "mean: got 0.5, allowed are 3 numbers", {"mean": 0.5, "std": 0.2}),
        (ValueError, "mean: got abc, allowed are 3 numbers", {"mean": "abc", "std": STD}),
        (ValueError, "mean: .* 0 to 1", {"mean": (123.0, 117.0, 104.0), "std": STD}),
        (ValueError, "std: .* more than 0", {"mean": MEAN, "std": (0.2, 0.0, 0.2)}),
        (UnsupportedError, "backend='triton'", {"backend": "triton", "dtype": torch.float64}),
    ]
    for error, message, arguments in cases:
        with pytest.raises(error, match=message):
            freeze(model, **arguments)
    with pytest.raises(TypeError, match="model: got Linear"):
        freeze(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model: got one in training mode"):
        freeze(narrow().train())
    with pytest.raises(ValueError, match="without heads"):
        freeze(narrow(num_classes=0))


def _hook(model: EfficientFormer) -> None:
    model.stages[0].blocks[0].register_forward_hook(lambda *_: None)  # type: ignore[union-attr, index, operator]


def _stem_activation(model: EfficientFormer) -> None:
    model.stem.act2 = nn.GELU()  # type: ignore[assignment]


def _stem_geometry(model: EfficientFormer) -> None:
    model.stem.conv1.padding = (0, 0)


def _statistics(model: EfficientFormer) -> None:
    model.stages[1].downsample.norm.train()  # type: ignore[union-attr, operator]


def _block(model: EfficientFormer) -> None:
    model.stages[2].blocks[0] = nn.Identity()  # type: ignore[index, union-attr, operator]
    model.stages[2].blocks[0].forward = lambda x: 2 * x  # type: ignore[index, union-attr]


def _training(model: EfficientFormer) -> None:
    model.train()


def _head(model: EfficientFormer) -> None:
    model.head = nn.Sequential(model.head)


def _whole(model: EfficientFormer) -> None:
    model.register_forward_pre_hook(lambda *_: None)


def _stem_longer(model: EfficientFormer) -> None:
    model.stem.add_module("more", nn.Sigmoid())


def _stem_moved(model: EfficientFormer) -> None:
    model.stem._modules["act1"] = model.stem._modules.pop("act1")


def _stem_shorter(model: EfficientFormer) -> None:
    del model.stem.act2


def _no_block(model: EfficientFormer) -> None:
    model.stages[2].blocks[0] = nn.Identity()  # type: ignore[index, union-attr, operator]


def _no_stage(model: EfficientFormer) -> None:
    model.stages[0] = nn.Identity()


def _groups(model: EfficientFormer) -> None:
    model.feature_norms[0] = nn.GroupNorm(2, 8).double()


def _no_affine(model: EfficientFormer) -> None:
    model.feature_norms[0] = nn.GroupNorm(1, 8, affine=False)


def _no_norm(model: EfficientFormer) -> None:
    model.feature_norms[0] = nn.Identity()


def _dropout(model: EfficientFormer) -> None:
    model.head_drop.p = 0.5
    model.head_drop.train()


@pytest.mark.parametrize(
    "change",
    [
        _hook,
        _stem_activation,
        _stem_geometry,
        _stem_longer,
        _stem_moved,
        _stem_shorter,
        _statistics,
        _block,
        _no_block,
        _no_stage,
        _groups,
        _no_affine,
        _no_norm,
        _training,
        _dropout,
        _head,
        _whole,
    ],
)
def test_a_changed_model_is_refused(
    narrow: Callable[..., EfficientFormer], change: Callable[[EfficientFormer], None]
) -> None:
    """It is refused: a frozen form without the change would be wrong."""
    model = narrow(feature_norm="inline")
    freeze(model)
    change(model)
    with pytest.raises(ValueError, match=r"^model: "):
        freeze(model)


def test_an_activation_with_parameters_is_refused(narrow: Callable[..., EfficientFormer]) -> None:
    with pytest.raises(ValueError, match="stages.0.blocks.0: activation 'prelu' has parameters"):
        freeze(narrow(act="prelu"))


def test_bad_images(narrow: Callable[..., EfficientFormer]) -> None:
    model = narrow()
    plain, pixels = freeze(model, torch.float32), freeze(model, torch.float32, mean=MEAN, std=STD)
    with pytest.raises(TypeError, match=r"allowed for uint8 is a model frozen with mean and std"):
        plain(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"got torch.float64, allowed is torch.float32 and torch.uint8"):
        pixels(torch.zeros(1, 3, 64, 64, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"got shape \[1, 64, 64, 3\], allowed is \[B, 3, H, W\]$"):
        plain(torch.zeros(1, 64, 64, 3))
    with pytest.raises(TypeError, match=r"images: got ndarray, allowed is a torch.Tensor"):
        pixels(torch.zeros(1, 3, 64, 64, dtype=torch.uint8).numpy())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"images: got shape \[1, 3, 64, 0\], allowed are sides of 1 or more"):
        pixels(torch.zeros(1, 64, 0, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="may be either"):
        pixels(torch.zeros(1, 3, 64, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="a tensor on meta, allowed is cpu"):
        plain(torch.zeros(1, 3, 64, 64, device="meta"))
    with pytest.raises(ValueError, match="requires a gradient"):
        plain(torch.zeros(1, 3, 64, 64, requires_grad=True))
    with torch.no_grad():
        plain(torch.zeros(1, 3, 64, 64, requires_grad=True))


# --- a snapshot -----------------------------------------------------------------------------------------------------------


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
    assert list(frozen._biases) == [(32, 32 * side) for side in range(4, 12)]


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


# --- graphs ---------------------------------------------------------------------------------------------------------------


class _Replay:
    """A graph's stand-in: replaying it computes into the first results, as a graph does."""

    def __init__(self, forward: Callable[[], Any]) -> None:
        self.forward, self.results, self.count = forward, forward(), 0

    def replay(self) -> None:
        self.count += 1
        for target, source in zip(listed(self.results), listed(self.forward()), strict=True):
            target.copy_(source)


@pytest.fixture
def graphed(monkeypatch: pytest.MonkeyPatch, narrow: Callable[..., EfficientFormer]) -> Callable[..., Any]:
    """A frozen narrow model on the CPU that believes in graphs."""

    def captured(forward: Callable[[], Any], pool: Any) -> Any:
        graph = _Replay(forward)
        return pool or object(), graph, graph.results

    def build(max_graphs: int, **options: Any) -> Any:
        model = narrow()
        frozen = freeze(model, torch.float64, mean=MEAN, std=STD, **options)
        frozen._max_graphs = max_graphs
        return model, frozen

    monkeypatch.setattr(inference, "capture_graph", captured)
    return build


def test_one_graph_for_each_shape_up_to_the_limit(graphed: Callable[..., Any]) -> None:
    model, frozen = graphed(3)
    pixels = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    for _ in range(2):
        for shape in ((2, 64, 64), (1, 64, 64), (1, 96, 64), (4, 64, 64)):
            x = torch.randn(shape[0], 3, *shape[1:], dtype=torch.float64)
            close(frozen(x), live(model, "logits", x))
        close(frozen(pixels), live(model, "logits", normalised(pixels)))
    assert frozen.graphs == ((2, 64, 64, False), (1, 64, 64, False), (1, 96, 64, False))
    biases = [{bias.data_ptr() for bias in graph.biases} for graph in frozen._graphs.values()]
    assert biases[0] == biases[1]
    assert not biases[0] & biases[2]
    assert [graph.graph.count for graph in frozen._graphs.values()] == [2, 2, 2]
    assert frozen.held_bytes == 8 * (3 * 64 * (2 * 64 + 64 + 96) + 4 * 10)
    pool = frozen._pool
    frozen.clear()
    assert frozen.graphs == ()
    close(frozen(pixels), live(model, "logits", normalised(pixels)))
    assert frozen.graphs == ((1, 64, 64, True),)
    assert frozen._pool is not pool


def test_padding_up_to_a_captured_batch(graphed: Callable[..., Any]) -> None:
    model, frozen = graphed(2, when_full="pad", output="features")
    frozen.capture((4, 64, 64), (8, 64, 64))
    for batch in (3, 4, 5, 1, 8):
        x = torch.randn(batch, 3, 64, 64, dtype=torch.float64)
        close(frozen(x), live(model, "features", x))
    assert [graph.graph.count for graph in frozen._graphs.values()] == [3, 2]
    for shape in ((9, 3, 64, 64), (2, 3, 96, 64), (0, 3, 64, 64)):
        x = torch.randn(shape, dtype=torch.float64)
        found = frozen(x)
        if shape[0]:
            close(found, live(model, "features", x))
        else:
            assert [f.shape[0] for f in found] == [0] * 4
    assert [graph.graph.count for graph in frozen._graphs.values()] == [3, 2]
    with pytest.raises(ValueError, match="allowed are 2 graphs"):
        frozen.capture((16, 64, 64))
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    close(frozen(pixels), live(model, "features", normalised(pixels)))  # not in a graph of float images


def test_results_are_new_unless_asked_otherwise(graphed: Callable[..., Any]) -> None:
    x, y = torch.randn(2, 1, 3, 64, 64, dtype=torch.float64)
    _, frozen = graphed(1)
    first = frozen(x)
    kept = first.clone()
    frozen(y)
    assert torch.equal(first, kept)
    _, frozen = graphed(1, new_outputs=False)
    first = frozen(x)
    assert torch.equal(frozen(y), first)
    assert not torch.equal(first, kept)
    _, frozen = graphed(1, new_outputs=False, when_full="pad")
    frozen.capture((3, 64, 64))
    close(frozen(x), kept)


def test_images_may_be_written_where_the_graph_reads_them(graphed: Callable[..., Any]) -> None:
    model, frozen = graphed(2)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    buffer = frozen.input_buffer(2, 64, 64)
    buffer.copy_(x)
    written = buffer._version
    close(frozen(buffer), live(model, "logits", x))
    assert buffer._version == written
    with pytest.raises(RuntimeError, match="single memory location"):
        frozen(buffer.transpose(2, 3))  # the same memory and shape, other images: not to be taken for the buffer
    pixels = frozen.input_buffer(1, 64, 32, uint8=True).permute(0, 2, 3, 1)
    pixels.random_(0, 256)
    close(frozen(pixels), live(model, "logits", normalised(pixels.permute(0, 3, 1, 2))))


def test_graphs_may_change_while_they_are_looked_at(graphed: Callable[..., Any]) -> None:
    """By other threads, which capture and clear."""
    _, frozen = graphed(8)
    frozen.capture((1, 32, 32), (2, 32, 32))
    bytes_held = frozen.held_bytes

    class Changing(dict[Any, Any]):
        def __getitem__(self, key: Any) -> Any:
            other = threading.Thread(target=self.clear_unlocked)
            other.start()
            other.join()
            return super().__getitem__(key)

        def clear_unlocked(self) -> None:
            if frozen._lock.acquire(blocking=False):
                self.clear()
                frozen._lock.release()

    class Graph:
        def __init__(self, graph: Any, added: int) -> None:
            self.results, self._images, self.added = graph.results, graph.images, added

        @property
        def images(self) -> Tensor:
            frozen._graphs[self.added, 32, 32, False] = self
            return self._images

    frozen._graphs = Changing(frozen._graphs)
    assert frozen.input_buffer(2, 32, 32).shape == (2, 3, 32, 32)
    frozen._graphs = {key: Graph(graph, key[0] + 2) for key, graph in frozen._graphs.items()}
    assert frozen.held_bytes == bytes_held
    assert len(frozen.graphs) == 4


def test_new_weights_reach_graphs(graphed: Callable[..., Any]) -> None:
    """Also the bias, which each graph has for its own size."""
    model, frozen = graphed(2)
    images = [torch.randn(1, 3, 64, side, dtype=torch.float64) for side in (64, 96, 160)]
    for x in images:
        frozen(x)
    randomise(model, seed=1)
    frozen.refresh()
    for x in images:
        close(frozen(x), live(model, "logits", x))
    assert len(frozen.graphs) == 2


def test_what_would_end_the_callers_capture_is_refused(
    graphed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, frozen = graphed(2)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    before = frozen(x)
    randomise(model, seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(frozen, "_within_a_graph", lambda: True)
        for name, call in (
            ("capture", lambda: frozen.capture((2, 64, 64))),
            ("capture", lambda: frozen.input_buffer(1, 64, 96)),
            ("clear", frozen.clear),
            ("refresh", frozen.refresh),
        ):
            with pytest.raises(RuntimeError, match=f"{name}: called within the capture of a graph"):
                call()
    assert frozen.graphs == ((1, 64, 64, False),)
    assert torch.equal(frozen(x), before)


class _Cuda:
    """The parts of torch.cuda that `capture_graph` uses: the current stream, and the captures."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current: list[Any] = [Mock(name="the caller's stream")]
        self.captures: list[tuple[Any, Any]] = []  # stream and pool
        self.capturing, self.most = 0, 0
        for name in ("Stream", "CUDAGraph", "graph_pool_handle"):
            monkeypatch.setattr(torch.cuda, name, Mock(side_effect=lambda: Mock()))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.current[-1])
        monkeypatch.setattr(torch.cuda, "stream", self.stream)
        monkeypatch.setattr(torch.cuda, "graph", self.graph)

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before = list(self.current)
        self.current.append(stream)
        try:
            yield
        finally:
            self.current[:] = before

    @contextlib.contextmanager
    def graph(self, graph: Any, *, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        self.captures.append((stream, pool))
        self.capturing += 1
        self.most = max(self.most, self.capturing)
        self.current.append(stream)  # not taken back after an error, as in `torch.cuda.graph` where the capture ends so
        try:
            yield
        finally:
            self.capturing -= 1
        self.current.pop()


def test_graphs_of_one_pool_are_captured_on_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise graphs would share no memory: the allocator reuses it on the stream of its allocation only."""
    cuda = _Cuda(monkeypatch)
    pool = None
    for _ in range(3):
        pool, _, result = inference.capture_graph(lambda: cuda.current[-1], pool)
        assert result is cuda.captures[0][0]
    assert len(set(cuda.captures)) == 1
    inference.capture_graph(lambda: None, None)
    assert cuda.captures[0][0] is not cuda.captures[-1][0]
    assert cuda.captures[0][1] is not cuda.captures[-1][1]


def test_a_capture_that_fails_leaves_the_callers_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = _Cuda(monkeypatch)
    with pytest.raises(ZeroDivisionError):
        inference.capture_graph(lambda: 1 // (1 - cuda.capturing), None)
    assert len(cuda.current) == 1
    assert cuda.capturing == 0


def test_one_capture_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all frozen models: PyTorch allows no more."""
    cuda = _Cuda(monkeypatch)
    threads = [
        threading.Thread(target=inference.capture_graph, args=(lambda: time.sleep(0.01), None)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(cuda.captures) == 4
    assert cuda.most == 1


def test_a_callers_graph_reads_nothing_that_may_be_given_up(
    graphed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a kept bias, which other sizes and new weights drive out, nor one that only a replay computes is kept."""
    model, frozen = graphed(0)
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    read: list[list[Tensor]] = []
    run = frozen._packed.run
    monkeypatch.setattr(
        frozen._packed, "run", lambda x, biases, backend: read.append(biases) or run(x, biases, backend)
    )
    frozen(x)
    frozen(x)
    assert read[0] is read[1]
    monkeypatch.setattr(frozen, "_within_a_graph", lambda: True)
    close(frozen(x), live(model, "logits", x))
    frozen(x[..., :64])
    monkeypatch.undo()
    assert read[2] is not read[0]
    assert list(frozen._biases) == [(64, 96)]
    assert frozen._biases[64, 96] is read[0]


def test_capture_says_what_it_cannot(narrow: Callable[..., EfficientFormer], graphed: Callable[..., Any]) -> None:
    frozen = freeze(narrow(), torch.float64)
    with pytest.raises(ValueError, match="allowed are 0 graphs"):  # there is no GPU
        frozen.capture((1, 64, 64))
    with pytest.raises(ValueError, match="without mean and std"):
        frozen.capture((1, 64, 64), uint8=True)
    _, frozen = graphed(2)
    with pytest.raises(ValueError, match="shapes: got 0"):
        frozen.capture((0, 64, 64))
    for shapes in ((64, 64, 64), ((64, 64),), ((1, 64, 64, 3),)):
        with pytest.raises(ValueError, match=r"shapes: got .*, allowed are \(batch, height, width\)"):
            frozen.capture(*shapes)
    assert frozen.graphs == ()


def test_published_networks_are_frozen_whole() -> None:
    """The operations of each, counted: 2 + 3 convolutions, depths, one end."""
    for name in effformer.list_models():
        model = effformer.create_model(name, device="meta").eval()
        config: EfficientFormerConfig = model.config
        frozen = freeze(model)
        steps = [step.operation for step in frozen._packed.steps]
        assert steps.count("conv_norm") == 5
        assert steps.count("meta4d") == sum(config.depths) - config.num_vit
        assert steps.count("attention_mixer") == steps.count("linear_mlp") == config.num_vit
        assert steps.count("head") == 1
        assert len(steps) == 5 + sum(config.depths) + config.num_vit + 2


@pytest.mark.parametrize(("batch", "launches"), [(1, 38), (256, 34)])
def test_nothing_but_kernels_between_images_and_logits(batch: int, launches: int) -> None:
    """L1 on Triton: what stands between the kernels moves no memory. They are only described here, and not run."""
    frozen = freeze(effformer.create_model("efficientformer_l1").eval(), torch.float16, backend="triton")
    x = torch.empty(batch, 3, 224, 224, dtype=torch.float16)
    with recorded(run=False) as record:
        frozen(x)  # expands the bias
    record.clear()
    with recorded(run=False) as record, torch.profiler.profile() as profile:
        frozen(x)
    assert len(record) == launches
    record.clear()
    seen = {event.name for event in profile.events() if event.name.startswith("aten::")}
    views = {"view", "permute", "transpose", "flatten", "reshape", "as_strided", "detach", "alias", "contiguous"}
    views |= {"to", "unsqueeze", "_reshape_alias", "empty", "empty_strided", "result_type"}
    assert {name.removeprefix("aten::") for name in seen} <= views
