"""Any image size: the bias of another map, and tracing with free sizes."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_reference import draw
from torch import Tensor

from effformer import EfficientFormer, create_model, ops
from effformer.config import BIAS_RESIZES
from effformer.reference import bias_index
from effformer.testing import randomise

Narrow = Callable[..., EfficientFormer]


def offsets(height: int, width: int) -> tuple[Tensor, Tensor]:
    """|dy| and |dx| of each pair of tokens [N, N], from the coordinates of each token."""
    points = torch.tensor(list(itertools.product(range(height), range(width))))
    return tuple((points[:, None] - points[None, :]).abs().double().unbind(-1))


def test_index() -> None:
    for height, width in ((7, 7), (3, 5), (1, 4), (16, 16)):
        dy, dx = offsets(height, width)
        assert torch.equal(bias_index(height, width), (dy * width + dx).long())


@pytest.mark.parametrize("resize", BIAS_RESIZES)
@pytest.mark.parametrize("resolution", [7, 16])
def test_at_its_own_size_the_table_is_looked_up(resize: str, resolution: int) -> None:
    table = draw(3, resolution**2)
    got = ops.expand_bias(table, resolution, resolution, resolution=resolution, resize=resize)
    assert torch.equal(got, table[:, bias_index(resolution, resolution)])


def test_a_linear_table_stays_linear_in_the_offsets() -> None:
    """A bias of a * dy + b * dx + c, in units of the map's side, means the same at every size."""
    y, x = torch.meshgrid(torch.arange(7.0), torch.arange(7.0), indexing="ij")
    a, b, c = torch.tensor([[0.3, -1.1], [2.0, 0.7], [-0.4, 0.9]], dtype=torch.float64)
    table = (a[:, None, None] * y + b[:, None, None] * x + c[:, None, None]).flatten(1)
    for height, width in itertools.product((2, 3, 5, 7, 8, 10, 17, 24), repeat=2):
        got = ops.expand_bias(table, height, width, resolution=7)
        dy, dx = offsets(height, width)
        scale_y, scale_x = 6 / (height - 1), 6 / (width - 1)
        want = a[:, None, None] * dy * scale_y + b[:, None, None] * dx * scale_x + c[:, None, None]
        assert (got - want).abs().max() < 1e-13, (height, width)


def test_height_and_width_are_not_confused() -> None:
    table = draw(2, 49)
    tall, wide = (ops.expand_bias(table, *size, resolution=7) for size in ((8, 10), (10, 8)))
    assert tall.shape == wide.shape == (2, 80, 80)
    assert not torch.allclose(tall, wide)
    mirrored = ops.expand_bias(table.view(2, 7, 7).mT.flatten(1), 10, 8, resolution=7)
    order = torch.arange(80).view(8, 10).T.flatten()  # tokens of the transposed map
    assert torch.allclose(mirrored, tall[:, order][:, :, order], rtol=0, atol=1e-13)


def test_a_side_of_one_has_offset_zero() -> None:
    table = draw(2, 49)
    assert torch.equal(ops.expand_bias(table, 1, 1, resolution=7), table[:, :1, None])
    row = ops.expand_bias(table, 1, 7, resolution=7)
    assert torch.equal(row, table[:, :7][:, bias_index(1, 7)])


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(8, 10), (3, 5)])
def test_matrix_modes_resize_the_matrix_as_an_image(mode: str, size: tuple[int, int]) -> None:
    table = draw(2, 49)
    tokens = size[0] * size[1]
    got = ops.expand_bias(table, *size, resolution=7, resize=f"matrix-{mode}")
    dy, dx = offsets(7, 7)
    image = table[:, (7 * dy + dx).long()][None]
    want = F.interpolate(image, (tokens, tokens), mode=mode)[0]
    assert torch.equal(got, want)
    trained = ops.expand_bias(table.requires_grad_(), *size, resolution=7, resize=f"matrix-{mode}").detach()
    assert torch.allclose(trained, want, rtol=0, atol=1e-14)
    assert not torch.allclose(got, ops.expand_bias(table.detach(), *size, resolution=7))


@pytest.mark.parametrize("resize", BIAS_RESIZES)
def test_gradients_reach_the_table(resize: str) -> None:
    table = draw(2, 9).requires_grad_()
    for size in ((3, 3), (4, 5), (2, 1)):
        assert torch.autograd.gradcheck(lambda t, s=size: ops.expand_bias(t, *s, resolution=3, resize=resize), table)
    got = ops.expand_bias(table.bfloat16(), 4, 5, resolution=3, resize=resize)
    assert got.dtype == torch.float32


def test_the_gradient_of_bicubic_resizing_is_a_product() -> None:
    """PyTorch's own has no deterministic form on a GPU: `torch.use_deterministic_algorithms` refuses it there."""
    table = draw(2, 9).float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.expand_bias(table, 4, 5, resolution=3, resize="matrix-bicubic")
    exact = ops.expand_bias(table.detach().double(), 4, 5, resolution=3, resize="matrix-bicubic")
    assert torch.allclose(got.double(), exact, rtol=0, atol=1e-6)
    names, todo = set(), [got.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None:
            names.add(node.name())
            todo += [function for function, _ in node.next_functions]
    assert not {name for name in names if "Upsample" in name}
    assert {name for name in names if "Index" in name}


def test_every_entry_of_the_table_matters_in_the_network(narrow: Narrow) -> None:
    network = narrow()
    network(draw(1, 3, 224, 224)).square().sum().backward()
    table = network.stages[3].blocks[2].token_mixer.attention_biases
    assert (table.grad != 0).all()


@torch.no_grad()
def test_the_network_uses_the_bias_of_its_map(narrow: Narrow) -> None:
    """An image and its transpose, through a network whose spatial weights are transposed too."""
    network, x = narrow(), draw(1, 3, 256, 320)
    mirrored = narrow()
    for parameter in mirrored.parameters():
        if parameter.ndim == 4:
            parameter.copy_(parameter.mT.clone())
    mixer = mirrored.stages[3].blocks[2].token_mixer
    mixer.attention_biases.copy_(mixer.attention_biases.view(2, 7, 7).mT.flatten(1).clone())
    want = network(x)
    assert torch.allclose(mirrored(x.mT), want, rtol=0, atol=1e-12)
    mixer.attention_biases.copy_(mixer.attention_biases.view(2, 7, 7).mT.flatten(1).clone())
    assert not torch.allclose(mirrored(x.mT), want, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (33, 65), (50, 47), (32, 320), (100, 224), (1, 1)])
def test_sizes_that_are_no_multiple_of_32(size: tuple[int, int]) -> None:
    network = randomise(create_model("efficientformer_l1")).eval()
    x = torch.randn(2, 3, *size)
    maps = network.forward_intermediates(x, intermediates_only=True)
    for reduction, feature in zip((4, 8, 16, 32), maps, strict=True):
        assert feature.shape[2:] == tuple(-(-side // reduction) for side in size)
        assert feature.isfinite().all()
    assert network(x).isfinite().all()


# --- tracing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [{}, {"feature_norm": "inline", "bias_resize": "matrix-bilinear"}], ids=str)
def test_fx_keeps_operations_whole_and_sizes_free(narrow: Narrow, overrides: dict[str, str]) -> None:
    network = narrow(**overrides)
    traced = torch.fx.symbolic_trace(network)
    called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert called.count(ops.meta4d) == 5
    assert called.count(ops.attention_mixer) == called.count(ops.linear_mlp) == called.count(ops.expand_bias) == 1
    for size in ((64, 64), (96, 160), (50, 47)):
        x = draw(2, 3, *size)
        assert torch.equal(traced(x), network(x))
    with torch.no_grad():  # buffers and parameters are the network's own, not constants of the trace
        network.stages[0].blocks[0].mlp.norm1.running_var.mul_(2)
        network.stages[3].blocks[2].token_mixer.attention_biases.mul_(2)
    before = traced(x)
    assert torch.equal(before, network(x))


def test_a_traced_network_can_be_saved(narrow: Narrow) -> None:
    network, buffer, x = narrow(), io.BytesIO(), draw(1, 3, 64, 64)
    torch.save(torch.fx.symbolic_trace(network), buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), network(x))


def test_fx_in_training_mode(narrow: Narrow) -> None:
    network = narrow().train()
    traced = torch.fx.symbolic_trace(network)
    x = draw(2, 3, 64, 96)
    assert torch.equal(traced(x), network(x))


def test_export_with_free_batch_and_size(narrow: Narrow) -> None:
    sides = {2: torch.export.Dim("height", min=33, max=2048), 3: torch.export.Dim("width", min=33, max=2048)}
    shapes = {"x": {0: torch.export.Dim("batch", min=1, max=4096), **sides}}
    few = {"depths": (1, 1, 1, 2)}
    for network in (
        narrow(**few),
        narrow(bias_resize="matrix-bicubic", feature_norm="tap", table_resolution=16, **few),
    ):
        with torch.no_grad():
            program = torch.export.export(network, (draw(2, 3, 64, 96),), dynamic_shapes=shapes)
            for batch, *size in ((2, 64, 96), (1, 33, 65), (5, 160, 96), (3, 224, 224)):
                x = draw(batch, 3, *size)
                assert torch.allclose(program.module()(x), network(x), rtol=0, atol=1e-12)


def test_export_of_l1_at_a_fixed_size() -> None:
    network = randomise(create_model("efficientformer_l1")).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        program = torch.export.export(network, (x,))
        assert torch.allclose(program.module()(x), network(x), rtol=0, atol=1e-5)
