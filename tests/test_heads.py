"""Replaced heads: outputs of two shapes are an error, and are never broadcast."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from live_networks import check, planned
from torch import Tensor, nn

from effformer import EfficientFormer, export, freeze, set_backend

Narrow = Callable[..., EfficientFormer]
FEW = {"depths": (1, 1, 1, 1)}
SIZES = 24, 10  # inputs and outputs of the heads


def _one_output(network: EfficientFormer) -> None:
    network.head = nn.Linear(SIZES[0], 1)


def _other_outputs(network: EfficientFormer) -> None:
    network.head_dist = nn.Linear(SIZES[0], 7)


def _more_dimensions(network: EfficientFormer) -> None:
    network.head = nn.Sequential(network.head, nn.Unflatten(1, (1, SIZES[1])))


def _sequential(network: EfficientFormer) -> None:
    network.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(SIZES[0], 1)).eval()


def _identity(network: EfficientFormer) -> None:
    network.head_dist = nn.Identity()


CHANGES = [_one_output, _other_outputs, _more_dimensions, _sequential, _identity]


@pytest.mark.parametrize("change", CHANGES)
def test_heads_of_two_sizes(narrow: Narrow, tmp_path: Path, change: Callable[[EfficientFormer], None]) -> None:
    network, x = narrow(dtype=torch.float32, **FEW), torch.randn(2, 3, 32, 32)
    set_backend(network, "triton")
    with torch.no_grad():
        network(x)  # a plan of the former heads
    assert planned(network)[-1]
    change(network)
    pooled = torch.randn(1, SIZES[0])  # of one image, where any two heads could be added
    for backend in ("auto", "eager"):
        set_backend(network, backend)
        for call in (lambda: network(x), lambda: network.train()(x), lambda: network.logits(pooled)):
            with pytest.raises(ValueError, match="^head, head_dist: got outputs of .* replace both heads"):
                call()
            with torch.no_grad(), pytest.raises(ValueError, match="^head, head_dist: got outputs of "):
                call()
            network.eval()
    set_backend(network, "triton")
    with torch.no_grad(), pytest.raises(ValueError, match="^head, head_dist: got outputs of "):
        network(x)
    with torch.no_grad():
        assert network.forward_head(network.forward_features(x), pre_logits=True).shape == (2, SIZES[0])
    for refused in (lambda: freeze(network, torch.float32), lambda: export(network, tmp_path / "n.pt2")):
        with pytest.raises(ValueError, match="^model: head.*(head_dist|not a Linear)"):
            refused()
    with pytest.raises(ValueError, match="head"):
        freeze(narrow(), torch.float32).refresh(network)


@pytest.mark.parametrize("mode", ["vmap", "compile", "fx", "export"])
def test_heads_of_two_sizes_are_not_traced(narrow: Narrow, mode: str) -> None:
    network, x = narrow(dtype=torch.float32, **FEW, backend="eager"), torch.randn(2, 3, 32, 32)
    _one_output(network)
    calls: dict[str, Callable[[], object]] = {
        "vmap": lambda: torch.vmap(lambda image: network(image[None]))(x),
        "compile": lambda: torch.compile(network, backend="eager")(x),
        "fx": lambda: torch.fx.symbolic_trace(network)(x),
        "export": lambda: torch.export.export(network, (x,)),
    }
    with pytest.raises(ValueError, match="head, head_dist: got outputs of "):
        calls[mode]()


@torch.no_grad()
def test_heads_of_one_size_may_be_replaced(narrow: Narrow) -> None:
    network, x = narrow(dtype=torch.float32, **FEW, backend="triton"), torch.randn(2, 3, 32, 32)
    for classes in (1, 3):
        network.head, network.head_dist = (nn.Linear(SIZES[0], classes) for _ in range(2))
        check(network, x)
        assert planned(network)[-1]
        assert network(x).shape == (2, classes)
        assert torch.allclose(freeze(network, torch.float32)(x), network(x), atol=1e-4)
    network.head = nn.Sequential(nn.Linear(SIZES[0], 3), nn.ReLU())
    check(network, x)
    network.head, network.head_dist = nn.Identity(), nn.Linear(SIZES[0], SIZES[0])
    assert network(x).shape == (2, SIZES[0])


def test_sizes_may_differ_where_heads_are_not_averaged(narrow: Narrow) -> None:
    network = narrow(dtype=torch.float32, **FEW).train()
    network.set_distilled_training()
    _other_outputs(network)
    both: tuple[Tensor, Tensor] = network(torch.randn(2, 3, 32, 32))
    assert [tuple(one.shape) for one in both] == [(2, SIZES[1]), (2, 7)]


def test_a_batch_that_is_free_stays_free(narrow: Narrow) -> None:
    network, x = narrow(dtype=torch.float32, **FEW, backend="eager"), torch.randn(2, 3, 32, 32)
    program = torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert program.module()(torch.randn(5, 3, 32, 32)).shape == (5, SIZES[1])
