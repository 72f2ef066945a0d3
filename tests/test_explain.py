"""`explain` tells what a forward does; `warm` leaves nothing for it to compile (see also stub_worker.py)."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable

import pytest
import torch
from effformer.kernels import launch
from machine import DEVICE, ON_GPU
from torch import nn

import effformer
from effformer import EfficientFormer, explain, set_backend, warm
from effformer.backend import UnsupportedError
from effformer.cli import main
from effformer.model import live

pytestmark = pytest.mark.usefixtures("kernel_device")

Narrow = Callable[..., EfficientFormer]
WHOLE = ["stem", "stages.0", "stages.1", "stages.2", "stages.3", "end"]


@pytest.fixture
def network(narrow: Narrow) -> EfficientFormer:
    return narrow(dtype=torch.float32, backend="triton", device=DEVICE)


def paths(network: EfficientFormer, x: torch.Tensor) -> dict[str, tuple[str, str | None]]:
    return {one.part: (one.path, one.why) for one in explain(network, x).parts}


@torch.no_grad()
def test_plans_of_whole_parts(network: EfficientFormer) -> None:
    x = torch.randn(2, 3, 64, 64)
    found = explain(network, x)
    assert [one.part for one in found.parts] == WHOLE
    assert {(one.path, one.why) for one in found.parts} == {("plan", None)}
    with launch.recorded(run=False) as launches:
        network(x)
    assert [one.kernel.__name__ for one in launches] == [name for one in found.parts for name in one.kernels or ()]
    assert found.launches == len(launches)
    lines = str(found).splitlines()
    assert len(lines) == 8
    assert lines[-1] == f"{len(launches)} launches"
    with torch.autocast(DEVICE.type, torch.float16):
        assert {one.path for one in explain(network, x).parts} == {"plan"}


@torch.no_grad()
def test_hooks_and_statistics_by_block(network: EfficientFormer) -> None:
    x, calls = torch.randn(1, 3, 64, 64), []
    set_backend(network, "triton")
    block = network.stages[2].blocks[0]
    block.backend = "auto"
    block.mlp.act.register_forward_hook(lambda *_: calls.append(1))
    network.stages[1].downsample.norm.train()
    before = network.stages[1].downsample.norm.running_mean.clone()
    found = paths(network, x)
    assert found["stages.2.blocks.0"] == ("modules", "submodule 'mlp.act' has hooks")
    assert found["stages.2.blocks.1"] == ("kernels", "its stage is not planned as a whole")
    assert found["stages.1.downsample"] == ("modules", "downsample: BatchNorm uses batch statistics")
    assert found["stages.1.blocks.0"][0] == "kernels"
    assert found["stages.0"] == found["stages.3"] == found["end"] == ("plan", None)
    assert calls == []
    assert torch.equal(network.stages[1].downsample.norm.running_mean, before)
    with launch.recorded(run=False) as launches:
        network(x)
    assert explain(network, x).launches == len(launches)
    assert "launches beside PyTorch's operators" in str(explain(network, x))
    block.backend = "triton"
    assert paths(network, x)["stages.2.blocks.0"][0] == "raises"
    with pytest.raises(UnsupportedError, match="mlp.act"):
        network(x)


def test_gradients_backends_and_dtypes(network: EfficientFormer, narrow: Narrow) -> None:
    x = torch.randn(1, 3, 64, 64)
    found = paths(network, x)
    assert found["stem"] == ("modules", "a gradient is needed")
    assert found["stages.0.blocks.0"] == ("kernels", "kernels compute its gradients, too")
    last = "stages.3.blocks." + str(len(network.stages[3].blocks) - 1)
    assert found[last] == ("kernels", "kernels compute its gradients, too")
    batch = "BatchNorm uses batch statistics here (training mode)"
    counted = network.train().stages[0].blocks[0].mlp.norm1.num_batches_tracked.item()
    in_training = paths(network, x)
    assert in_training["stages.0.blocks.0"] == ("kernels", f"{batch}: kernels compute that, and its gradients")
    assert network.stages[0].blocks[0].mlp.norm1.num_batches_tracked.item() == counted
    network.stages[0].blocks[0].mlp.drop.p = 0.5
    assert paths(network, x)["stages.0.blocks.0"] == ("raises", "dropout is active here (training mode)")
    network.stages[0].blocks[0].mlp.drop.p = 0.0
    network.eval()
    with torch.no_grad():
        set_backend(network, "eager")
        assert set(paths(network, x).values()) == {("modules", "backend='eager'"), ("eager", "backend='eager'")}
        if not ON_GPU:
            set_backend(network, "auto")
            assert {why for _, why in paths(network, x).values()} == {"'cpu' is not an NVIDIA GPU"}
        set_backend(network, "triton")
        double = network.double()
        assert "float64" in str(paths(double, x.double())["stages.0.blocks.0"][1])
        prelu = narrow(dtype=torch.float32, act="prelu", backend="triton", device=DEVICE)
        assert "has parameters" in str(paths(prelu, x)["stages.0.blocks.0"][1])
        network.float().stages[0].blocks.append(nn.Identity())
        assert paths(network, x)["stages.0.blocks.1"] == ("modules", "its class is Identity")


@torch.no_grad()
def test_launches_within_composed_blocks_and_of_other_threads(network: EfficientFormer) -> None:
    x = torch.randn(1, 3, 64, 64)
    block = network.stages[3].blocks[-1]
    set_backend(network, "auto" if ON_GPU else "triton")
    block.backend = "auto"  # "triton" refuses to compose
    block.mlp.act.register_forward_hook(lambda *_: None)
    found, name = explain(network, x), "stages.3.blocks." + str(len(network.stages[3].blocks) - 1)
    by_name = {one.part: one for one in found.parts}
    assert (by_name[name].path, by_name[name].kernels) == ("modules", None)
    assert by_name[f"{name}.token_mixer"].kernels == ("bias_attention_kernel",)
    with launch.recorded(run=False) as launches:
        network(x)
    assert found.launches == len(launches)

    stop = threading.Event()

    def busy() -> None:
        while not stop.is_set():
            with torch.no_grad(), launch.recorded(run=False):
                other(images)

    other, images = copy.deepcopy(network), torch.randn(1, 3, 32, 32, device=DEVICE)
    thread = threading.Thread(target=busy)
    thread.start()
    try:
        assert {explain(network, x).launches for _ in range(5)} == {found.launches}
    finally:
        stop.set()
        thread.join()


@torch.no_grad()
def test_a_replaced_body_of_the_forward(network: EfficientFormer) -> None:
    network.forward_features = lambda x: torch.ones(1, 4, network.num_features)  # type: ignore[method-assign]
    assert paths(network, torch.randn(1, 3, 64, 64))["end"] == ("modules", "forward_features was replaced")


@torch.no_grad()
def test_hooks_for_all_modules_and_replaced_parts(network: EfficientFormer) -> None:
    x = torch.randn(1, 3, 64, 64)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        found = explain(network, x)
        assert {one.path for one in found.parts if "blocks" not in one.part} == {"modules"}
        assert {one.path for one in found.parts if "blocks" in one.part} == {"raises"}
    finally:
        handle.remove()
    network.stages[1] = nn.Sequential(network.stages[1])
    network.stem = nn.Sequential(*network.stem)
    network.forward_head = lambda x: x.mean(1)  # type: ignore[method-assign,misc,assignment]
    found = paths(network, x)
    assert found["stem"] == found["stages.1"] == ("modules", "its class is Sequential")
    assert found["end"] == ("modules", "forward_head or logits was replaced")
    assert found["stages.2"] == ("plan", None)


def test_what_explain_and_warm_refuse(network: EfficientFormer) -> None:
    with pytest.raises(TypeError, match="model: got Linear"):
        explain(nn.Linear(1, 1), torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match=r"images: got shape \[3, 64, 64\], allowed is \[B, 3, H, W\]"):
        explain(network, torch.zeros(3, 64, 64))
    with pytest.raises(TypeError, match="images: got torch.float16, allowed is the network's torch.float32"):
        explain(network, torch.zeros(1, 3, 64, 64).half())
    with pytest.raises(ValueError, match="images: got a tensor on meta, allowed is the model's device"):
        explain(network, torch.zeros(1, 3, 64, 64, device="meta"))
    with pytest.raises(ValueError, match="shapes: got none"):
        warm(network)
    with pytest.raises(ValueError, match="shapes: got 1, allowed are"):
        warm(network, 1, 224, 224)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="dtype: got torch.int64"):
        warm(network, (1, 64, 64), dtype=torch.int64)
    network.stages[1].downsample.norm.train()
    with pytest.raises(ValueError, match=r"model: got stages.1.downsample.norm in training mode"):
        warm(network, (1, 64, 64))
    with pytest.raises(ValueError, match=r"shapes: got \(1, 64\), allowed are \(batch, height, width\)"):
        warm(network, (1, 64))
    with pytest.raises(ValueError, match="shapes: got 0"):
        warm(network, (0, 64, 64))
    with pytest.raises(ValueError, match="model: got the model in training mode"):
        warm(network.train(), (1, 64, 64))


def test_warm_runs_each_shape(network: EfficientFormer) -> None:
    warm(network, (1, 64, 64), (2, 32, 32))
    for part in (network.stem, *network.stages):
        assert [form[0][0] for form in live._states[part].plans] == [1, 2]


def test_info_explains(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--explain", "l1", "--size", "64x64", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "efficientformer_l1, one image of 64x64 in float32:" in out
    assert "stages.3.blocks.4    eager           -  'cpu' is not an NVIDIA GPU" in out
    assert main(["info", "--explain", "l1", "--size", "64x64", "--device", "cpu", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["explanation"][0] == {
        "part": "stem", "path": "modules", "why": "'cpu' is not an NVIDIA GPU", "kernels": None,
    }  # fmt: skip
    assert effformer.explain is explain
    for option in (["--dtype", "fp16"], ["--device", "cpu"]):
        assert main(["info", *option]) == 1
        assert f"{option[0]}: allowed is only together with --explain" in capsys.readouterr().err
