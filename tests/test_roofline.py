"""FLOPs and bytes against PyTorch's own count, against the tensors of real calls, and by hand."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from effformer.bench.measure.roofline import OPERATIONS, Ceilings, Part, cost, network_floor, network_parts
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from effformer import create_model, list_models
from effformer.apps import verify as verification
from effformer.apps.verify import checks, draw
from effformer.config import PRESETS
from effformer.model.blocks import Attention, Downsample, Meta4D
from effformer.testing import Case

H200 = Ceilings(788e12, 4.3e12)


def floors(name: str) -> dict[str, float]:
    """Microseconds of all equal parts, at batch 256, 224x224, in 16 bit."""
    parts = network_parts(PRESETS[name], 256, (224, 224), torch.bfloat16)
    return {part.name: 1e6 * part.count * part.floor(H200) for part in parts}


def test_floors_of_l1() -> None:
    """The floors that the kernels were designed for; they are of the network before its head."""
    found = floors("efficientformer_l1")
    assert found["stem, 1st"] + found["stem, 2nd"] == pytest.approx(108, abs=0.5)
    assert found["stage 1, 4D"] == pytest.approx(3 * 37.6, abs=0.15)
    assert found["stage 2, 4D"] == pytest.approx(2 * 37.6, abs=0.1)
    assert found["stage 3, 4D"] == pytest.approx(6 * 51.1, abs=0.3)
    assert found["stage 4, 4D"] == pytest.approx(3 * 51.1, abs=0.15)
    assert found["stage 4, attention"] == pytest.approx(38.5, abs=0.05)
    assert found["stage 4, MLP"] == pytest.approx(51.1, abs=0.05)
    assert sum(found[f"downsampling {n}"] for n in (1, 2, 3)) == pytest.approx(80, abs=0.5)
    assert sum(found.values()) - found["head"] == pytest.approx(925, abs=0.5)


@pytest.mark.parametrize(("name", "ms"), [("efficientformer_l3", 2.63), ("efficientformer_l7", 6.68)])
def test_floors_of_the_others(name: str, ms: float) -> None:
    found = floors(name)
    assert (sum(found.values()) - found["head"]) / 1e3 == pytest.approx(ms, abs=0.005)
    floor = network_floor(PRESETS[name], 256, (224, 224), torch.bfloat16, H200)
    assert 1e6 * floor == pytest.approx(sum(found.values()))


def test_a_floor_is_the_higher_of_two() -> None:
    part = Part("", "conv_mlp", (1,), 5, flops=6.0, bytes=2.0)
    assert part.floor(Ceilings(3.0, 2.0)) == 2.0, "of one of them"
    assert part.floor(Ceilings(3.0, 0.5)) == 4.0


# --- FLOPs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(224, 224), (97, 190)], ids=str)
@pytest.mark.parametrize("name", list_models())
def test_network_flops(name: str, size: tuple[int, int]) -> None:
    """Those that PyTorch counts in the eager network, whose two heads are one here."""
    model = create_model(name, device="meta", num_classes=10, in_chans=4, backend="eager").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(3, 4, *size, device="meta"))
    parts = network_parts(PRESETS[name], 3, size, torch.float16, in_chans=4, num_classes=10)
    one_head = 2 * 3 * 10 * PRESETS[name].widths[-1]
    assert sum(part.count * part.flops for part in parts) == counter.get_total_flops() - one_head


@pytest.mark.parametrize("size", [(224, 224), (97, 190)], ids=str)
@pytest.mark.parametrize("name", list_models())
def test_parts_are_those_of_the_network(name: str, size: tuple[int, int]) -> None:
    """What goes into its modules, and how many there are of them."""
    model = create_model(name, device="meta", backend="eager").eval()
    seen: Counter[Any] = Counter()
    operations = {Meta4D: "meta4d", Downsample: "conv_norm", Attention: "attention_mixer"}
    for module in model.modules():
        if type(module) in operations or module in (model.stem.conv1, model.stem.conv2, model.norm):
            op = operations.get(type(module), "head" if module is model.norm else "conv_norm")
            module.register_forward_pre_hook(lambda _, x, op=op: seen.update([(op, tuple(x[0].shape))]))
    for block in (module for module in model.modules() if isinstance(module, nn.Linear)):
        if block.out_features == int(PRESETS[name].widths[-1] * PRESETS[name].mlp_ratio):
            block.register_forward_pre_hook(lambda _, x: seen.update([("linear_mlp", tuple(x[0].shape))]))
    with torch.no_grad():
        model(torch.empty(2, 3, *size, device="meta"))
    parts = network_parts(PRESETS[name], 2, size, torch.float16)
    assert {(part.op, part.shape): part.count for part in parts} == dict(seen)


@pytest.mark.parametrize("name", list_models())
def test_parts_are_measured(name: str) -> None:
    """Each is a cell of the kernel benchmark, by operation, shape and options."""
    parts = network_parts(PRESETS[name], 2, (97, 190), torch.float16)
    found = checks([name], {part.op for part in parts}, [torch.float16], size=(97, 190), batch_size=2)
    measured = [(check.operation, check.shape, check.options) for check in found]
    assert all((part.op, part.shape, part.options) in measured for part in parts)


# --- FLOPs and bytes of an operation ------------------------------------------------------------------------------------

CHECKS = checks(
    ["efficientformer_l1"],
    [name for name in verification.OPERATIONS if name != verification.NETWORK],
    [torch.float16, torch.float32],
    size=(72, 97),
    batch_size=3,
)


@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_cost_of_an_operation(check: verification.Check) -> None:
    """FLOPs as PyTorch counts them; bytes of the tensors that go in and come out."""
    case = draw(check, torch.device("cpu")).to(torch.device("meta"))
    assert isinstance(case, Case)
    with FlopCounterMode(display=False) as counter:
        out = case.run("eager")
    flops, traffic = cost(check.operation, check.shape, check.options, check.dtype)
    assert flops == counter.get_total_flops()
    assert traffic == sum(tensor.nbytes for tensor in (*case.arguments, out))


@pytest.mark.parametrize(
    ("op", "shape", "options", "dtype", "flops", "traffic"),
    [
        # 2 images of 4 x 3 pixels -> 2 x 2; 45 weights an output, 7 outputs; float32 scale and shift
        ("conv_norm", (2, 5, 4, 3), {"outputs": 7}, torch.float16,
         2 * 2 * 4 * 45 * 7, 2 * (120 + 315 + 2 * 4 * 7) + 4 * 14),
        ("conv_norm", (2, 5, 4, 3), {"outputs": 7}, torch.float64,
         2 * 2 * 4 * 45 * 7, 8 * (120 + 315 + 2 * 4 * 7 + 14)),
        ("head", (2, 6, 5), {"classes": 7}, torch.float16, 2 * 2 * 35, 2 * (60 + 35 + 14) + 4 * (10 + 7)),
        ("head", (2, 6, 5), {"classes": None}, torch.float32, 0, 4 * (60 + 10 + 10)),
        ("bias_attention", (2, 6, 2 * 13), {"num_heads": 2, "key_dim": 4, "value_dim": 5}, torch.float16,
         2 * 2 * 2 * 36 * (4 + 5), 2 * (2 * 6 * 26 + 2 * 6 * 10) + 4 * 2 * 36),
    ],
)  # fmt: skip
def test_cost_by_hand(
    op: str, shape: tuple[int, ...], options: dict[str, Any], dtype: torch.dtype, flops: int, traffic: int
) -> None:
    assert cost(op, shape, options, dtype) == (flops, traffic)


def test_every_operation_has_a_cost() -> None:
    assert {name for name in verification.OPERATIONS if name != verification.NETWORK} <= set(OPERATIONS)
    with pytest.raises(ValueError, match=r"op: got 'mean' \(str\), allowed is one of pool_mixer"):
        cost("mean", (1, 2, 3), {}, torch.float16)
    with pytest.raises(ValueError, match="size: got 0"):
        network_parts(PRESETS["efficientformer_l1"], 1, (32, 0), torch.float16)
