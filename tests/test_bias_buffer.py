"""`attention_bias_idxs` is a buffer that other tools fill, swap, average and save, and that no forward reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from small_networks import DEPTHS, small
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from effformer import create_model

INDEX = "stages.3.blocks.2.token_mixer.attention_bias_idxs"
IMAGES = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def test_every_key_is_a_parameter_or_a_buffer() -> None:
    network = small()
    names = {name for name, _ in [*network.named_parameters(), *network.named_buffers()]}
    assert set(network.state_dict()) == names


def test_functional_call() -> None:
    network, other = small(seed=1), small(seed=2)
    state = other.state_dict() | {INDEX: torch.zeros_like(other.state_dict()[INDEX])}
    assert torch.allclose(torch.func.functional_call(network, state, (IMAGES,)), other(IMAGES), atol=1e-5)
    stacked = torch.func.stack_module_state([network, other])
    both = torch.vmap(lambda *state: torch.func.functional_call(network, state, (IMAGES,)))(*stacked)
    assert torch.allclose(both[1], other(IMAGES), atol=1e-5)


def test_accelerate_fills_an_empty_network(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    network = small()
    safetensors.torch.save_file(network.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    for include_buffers in (False, True):
        with accelerate.init_empty_weights(include_buffers=include_buffers):
            empty = create_model("efficientformer_l1", depths=DEPTHS, num_classes=10).eval()
        full = accelerate.load_checkpoint_and_dispatch(
            empty, str(tmp_path / "model.safetensors"), device_map={"": "cpu"}
        )
        assert torch.allclose(full(IMAGES), network(IMAGES), atol=1e-5)


def test_an_average_with_buffers_keeps_the_index() -> None:
    network = small()
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.9999), use_buffers=True)
    for _ in range(3):
        average.update_parameters(network)
    damaged = dict(average.module.named_buffers())[INDEX]
    assert not torch.equal(damaged, network.get_buffer(INDEX))  # else this test shows nothing
    assert torch.equal(average.module.state_dict()[INDEX], network.get_buffer(INDEX))
    assert torch.allclose(average(IMAGES), network(IMAGES), atol=1e-4)


def test_loading_onto_meta_tensors() -> None:
    state = {key: value for key, value in small().state_dict().items() if key != INDEX}
    empty = create_model("efficientformer_l1", depths=DEPTHS, num_classes=10, device="meta").eval()
    empty.load_state_dict(state, assign=True)
    assert not empty.get_buffer(INDEX).is_meta
    assert torch.allclose(empty(IMAGES), small()(IMAGES), atol=1e-5)
