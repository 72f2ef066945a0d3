"""FLOPs and bytes of operations by hand; those of networks against PyTorch's count of the whole."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from effformer.bench.measure.roofline import Ceilings, cost, network_least_time, network_parts
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from effformer import create_model, list_models
from effformer.apps.verify import checks
from effformer.config import PRESETS
from effformer.model.blocks import Attention, Downsample
from effformer.model.meta4d import Meta4D
from effformer.testing import draw_case
from effformer.workload import OPERATIONS, halved, network_work

H200 = Ceilings(788e12, 4.3e12)


def least_times(name: str) -> dict[str, float]:
    """Microseconds of all equal parts, at batch 256, 224x224, in 16 bit."""
    parts = network_parts(PRESETS[name], 256, (224, 224), torch.bfloat16)
    return {work.part: 1e6 * work.count * H200.least_time(*amounts) for work, amounts in parts}


def test_least_times_of_l1() -> None:
    """Those that the kernels were designed for, of the network before its head."""
    found = least_times("efficientformer_l1")
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
def test_least_times_of_the_others(name: str, ms: float) -> None:
    found = least_times(name)
    assert (sum(found.values()) - found["head"]) / 1e3 == pytest.approx(ms, abs=0.005)
    least = network_least_time(PRESETS[name], 256, (224, 224), torch.bfloat16, H200)
    assert 1e6 * least == pytest.approx(sum(found.values()))


def test_the_slower_of_two_counts() -> None:
    assert Ceilings(3.0, 2.0).least_time(flops=6.0, bytes=2.0) == 2.0
    assert Ceilings(3.0, 0.5).least_time(flops=6.0, bytes=2.0) == 4.0


# --- FLOPs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(224, 224), (97, 190)], ids=str)
@pytest.mark.parametrize("name", list_models())
def test_network_flops(name: str, size: tuple[int, int]) -> None:
    """Those that PyTorch counts in the eager network, whose two heads are one here."""
    model = create_model(name, device="meta", backend="eager").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(3, 3, *size, device="meta"))
    parts = network_parts(PRESETS[name], 3, size, torch.float16)
    one_head = 2 * 3 * 1000 * PRESETS[name].widths[-1]
    assert sum(work.count * flops for work, (flops, _) in parts) == counter.get_total_flops() - one_head


@pytest.mark.parametrize("size", [(224, 224), (97, 190)], ids=str)
@pytest.mark.parametrize("name", list_models())
def test_parts_are_those_of_the_network(name: str, size: tuple[int, int]) -> None:
    """The inputs of its modules, and their number."""
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
    assert {(work.operation, work.shape): work.count for work, _ in parts} == dict(seen)


@pytest.mark.parametrize("name", list_models())
def test_parts_are_measured(name: str) -> None:
    """The kernel benchmark has each, by operation, shape and options."""
    works = [work for work, _ in network_parts(PRESETS[name], 2, (97, 190), torch.float16)]
    found = checks([name], {work.operation for work in works}, [torch.float16], size=(97, 190), batch_size=2)
    measured = [(check.operation, check.shape, check.options) for check in found]
    assert all((work.operation, work.shape, work.options) in measured for work in works)


# --- FLOPs and bytes of an operation ------------------------------------------------------------------------------------

HEADS = {"num_heads": 2, "key_dim": 4, "value_dim": 5}  # 26 channels of queries, keys and values
BY_HAND: list[tuple[str, tuple[int, ...], dict[str, Any], torch.dtype, int, int]] = [
    ("pool_mixer", (2, 5, 4, 3), {}, torch.float16, 0, 2 * (120 + 120) + 4 * 5),
    # 24 pixels; two weights of 7 x 5; scale and shift of both products
    ("conv_mlp", (2, 5, 4, 3), {"hidden": 7}, torch.float16,
     2 * 24 * (35 + 35), 2 * (120 + 120 + 35 + 35) + 4 * (7 + 7 + 5 + 5)),
    ("meta4d", (2, 5, 4, 3), {"hidden": 7}, torch.bfloat16,
     2 * 24 * (35 + 35), 2 * (120 + 120 + 35 + 35) + 4 * (5 + 7 + 7 + 5 + 5)),
    # 2 images of 4 x 3 pixels -> 2 x 2; 45 weights an output, 7 outputs; scale and shift
    ("conv_norm", (2, 5, 4, 3), {"outputs": 7}, torch.float16,
     2 * 2 * 4 * 45 * 7, 2 * (120 + 315 + 2 * 4 * 7) + 4 * 14),
    ("conv_norm", (2, 5, 4, 3), {"outputs": 7}, torch.float32,
     2 * 2 * 4 * 45 * 7, 4 * (120 + 315 + 2 * 4 * 7 + 14)),
    ("bias_attention", (2, 6, 26), HEADS, torch.float16,
     2 * 2 * 2 * 36 * (4 + 5), 2 * (2 * 6 * 26 + 2 * 6 * 10) + 4 * 2 * 36),
    # the attention and both its projections; norm, bias of the first, layer scale and shift of the second
    ("attention_mixer", (2, 6, 3), HEADS, torch.float16,
     2 * 2 * 2 * 36 * (4 + 5) + 2 * 12 * 3 * (26 + 10),
     2 * (2 * 36 + 3 * (26 + 10)) + 4 * (2 * 36 + 3 + 3 + 26 + 3 + 3)),
    # 12 rows; norm, the first shift, the second scale and shift
    ("linear_mlp", (2, 6, 3), {"hidden": 7}, torch.float16,
     2 * 12 * (21 + 21), 2 * (36 + 36 + 21 + 21) + 4 * (3 + 3 + 7 + 3 + 3)),
    ("head", (2, 6, 5), {"classes": 7}, torch.float16, 2 * 2 * 35, 2 * (60 + 35 + 14) + 4 * (10 + 7)),
    ("head", (2, 6, 5), {"classes": None}, torch.float32, 0, 4 * (60 + 10 + 10)),
]  # fmt: skip


@pytest.mark.parametrize(("op", "shape", "options", "dtype", "flops", "traffic"), BY_HAND, ids=str)
def test_cost_by_hand(
    op: str, shape: tuple[int, ...], options: dict[str, Any], dtype: torch.dtype, flops: int, traffic: int
) -> None:
    assert cost(op, shape, options, dtype) == (flops, traffic)


def test_every_operation_has_a_cost() -> None:
    assert {op for op, *_ in BY_HAND} == set(OPERATIONS)
    with pytest.raises(ValueError, match=r"operation: got 'mean' \(str\), allowed is one of pool_mixer"):
        cost("mean", (1, 2, 3), {}, torch.float16)
    with pytest.raises(ValueError, match="size: got 0"):
        network_parts(PRESETS["efficientformer_l1"], 1, (32, 0), torch.float16)
    with pytest.raises(ValueError, match="batch_size: got 0"):
        network_parts(PRESETS["efficientformer_l1"], 0, (32, 32), torch.float16)


def test_pooled_features_have_no_weights() -> None:
    *_, head = network_work(PRESETS["efficientformer_l1"], 2, (224, 224), num_classes=0)
    amounts = cost(head.operation, head.shape, head.options, torch.float16)
    assert (head.part, *amounts) == ("head", 0, 2 * (2 * 49 + 2) * 448 + 4 * 2 * 448)


# --- the description of a network -----------------------------------------------------------------------------------------


def test_work_of_other_networks() -> None:
    """Without 3D blocks, without 4D blocks in the last stage, and with another activation."""
    config = dataclasses.replace(PRESETS["efficientformer_l1"], num_vit=0, act="silu")
    without = list(network_work(config, 2, (224, 224)))
    assert not {work.operation for work in without} & {"attention_mixer", "bias_attention", "linear_mlp"}
    assert [work.count for work in without if work.operation == "meta4d"] == [3, 2, 6, 4]
    options = {"hidden": 1792, "activation": "silu"}
    assert [work.options for work in without if work.shape == (2, 448, 7, 7)] == [options, options, {}]
    case = draw_case("meta4d", (1, 8, 2, 2), torch.float32, hidden=9, activation="silu")
    assert case.options["activation"] == "silu"
    last = [work for work in network_work(PRESETS["efficientformer_l7"], 2, (224, 224)) if work.where == "stage 4"]
    counts = {work.operation: work.count for work in last}
    assert counts == {"conv_norm": 1, "attention_mixer": 8, "bias_attention": 0, "linear_mlp": 8, "head": 1}


def test_cases_have_the_shape_and_layout_asked_for() -> None:
    for operation, shape, options, dtype, *_ in BY_HAND:
        case = draw_case(operation, shape, dtype, **options)
        assert (case.operation, case.arguments[0].shape, case.arguments[0].dtype) == (operation, shape, dtype)
    assert draw_case("pool_mixer", (2, 5, 4, 3), torch.float16).arguments[0].stride(1) == 1
    assert draw_case("pool_mixer", (2, 5, 4, 3), torch.float16, "contiguous").arguments[0].is_contiguous()
    with pytest.raises(ValueError, match=r"layout: got 'dense' \(str\), allowed is one of channels_last, cropped"):
        draw_case("pool_mixer", (2, 5, 4, 3), torch.float16, "dense")


def test_halved_is_what_the_convolution_does() -> None:
    convolution = nn.Conv2d(1, 1, 3, stride=2, padding=1, device="meta")
    for side in range(1, 9):
        assert convolution(torch.empty(1, 1, side, side, device="meta")).shape[2] == halved(side)
