"""Numbers of NumPy and of tensors count as Python's, booleans do not; configs and networks keep Python's."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch

import effformer
from effformer import EfficientFormer, EfficientFormerConfig, create_model, freeze
from effformer.checks import COUNT, PROBABILITY, as_int, as_number, check, check_count, check_shapes, is_number, plain
from effformer.features import check_rising

Narrow = Callable[..., EfficientFormer]
INTEGERS = [3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3), torch.tensor(3, dtype=torch.uint8)]
FLOATS = [0.25, np.float32(0.25), np.float64(0.25), np.float16(0.25), np.array(0.25), torch.tensor(0.25)]
NEITHER: list[Any] = [
    True, False, np.True_, np.array(True), torch.tensor(True), None, "3", np.str_("3"), b"3", 1j, np.complex64(1),
    [3], (3,), np.array([3]), torch.tensor([3]), torch.tensor([0.5]), np.array("3"), np.datetime64("2020"),
    torch.zeros((), device="meta"), torch.zeros((), dtype=torch.int64, device="meta"),
]  # fmt: skip


@pytest.mark.parametrize("value", INTEGERS, ids=repr)
def test_integers(value: Any) -> None:
    assert as_int(value) == as_number(value) == plain(value) == check_count("x", value) == check("x", value, COUNT) == 3
    assert {type(found) for found in (as_int(value), plain(value), check("x", value, COUNT))} == {int}


@pytest.mark.parametrize("value", FLOATS, ids=repr)
def test_floats(value: Any) -> None:
    assert as_int(value) is None
    assert as_number(value) == plain(value) == check("x", value, PROBABILITY) == 0.25
    assert type(plain(value)) is type(check("x", value, PROBABILITY)) is float
    with pytest.raises(ValueError, match="^x: got .*, allowed is an integer of 0 or more$"):
        check_count("x", value)


@pytest.mark.parametrize("value", NEITHER, ids=repr)
def test_values_that_are_no_numbers(value: Any) -> None:
    assert as_int(value) is None
    assert not is_number(value)
    for rule in (COUNT, PROBABILITY):
        with pytest.raises(ValueError, match=r"(?s)^x: got .*, allowed is a"):
            check("x", value, rule)
    with pytest.raises(ValueError, match=r"(?s)^x: got .*, allowed is an integer of 0 or more$"):
        check_count("x", value)


def test_limits_hold_for_them() -> None:
    for value in (np.int64(-1), torch.tensor(-1), np.array(-1)):
        with pytest.raises(ValueError, match="allowed is an integer of 0 or more"):
            check_count("x", value)
    for value in (np.float32(1.5), np.float64("nan"), torch.tensor(float("inf"))):
        with pytest.raises(ValueError, match="allowed is a number from 0 to 1"):
            check("x", value, PROBABILITY)


def test_nested_values() -> None:
    found = plain((np.int8(1), (torch.tensor(2.5), "3"), None))
    assert found == (1, (2.5, "3"), None)
    assert [type(one) for one in (found[0], found[1][0])] == [int, float]
    (shape,) = check_shapes([(np.int64(1), np.int32(2), torch.tensor(3))])
    assert shape == (1, 2, 3)
    assert {type(size) for size in shape} == {int}


@pytest.mark.parametrize("container", [tuple, list, np.array, torch.tensor])
def test_a_config_can_be_written(container: Callable[[Any], Any]) -> None:
    config = EfficientFormerConfig(
        depths=container([1, 1, 1, 2]), widths=container([8, 12, 16, 24]), num_vit=np.int64(1), num_heads=np.int8(2),  # type: ignore[arg-type]
        key_dim=torch.tensor(4), value_ratio=np.float32(2), mlp_ratio=np.int64(3), proj_drop=np.float64(0.1),  # type: ignore[arg-type]
    )  # fmt: skip
    again = EfficientFormerConfig(**json.loads(json.dumps(asdict(config))))
    assert again == config
    assert hash(again) == hash(config)
    assert (type(config.value_ratio), type(config.mlp_ratio), type(config.depths[3])) == (float, int, int)
    with pytest.raises(ValueError, match=r"num_vit: got (np.True_|True) \(bool_?\)"):
        EfficientFormerConfig(depths=(1, 1, 1, 1), widths=(8, 8, 8, 8), num_vit=np.bool_(True))  # type: ignore[arg-type]


def test_arguments_of_networks() -> None:
    labels = torch.tensor([0, 2, 1])
    network = create_model(
        "efficientformer_l1", depths=np.array([1, 1, 1, 1]), num_classes=labels.max() + 1, in_chans=np.int64(4),  # type: ignore[arg-type]
        drop_path_rate=np.float32(0.5), drop_rate=torch.tensor(0.25), proj_drop_rate=np.float16(0.125),
        layer_scale_init_value=np.float64(0.5),
    )  # fmt: skip
    assert network.head.out_features == network.num_classes == 3
    kept = network.num_classes, network.in_chans, network.drop_rate, network.drop_path_rate, network.config.proj_drop
    assert kept == (3, 4, 0.25, 0.5, 0.125)
    assert [type(one) for one in kept] == [int, int, float, float, float]
    network.reset_classifier(np.uint16(5))  # type: ignore[arg-type]
    assert (type(network.num_classes), network.head_dist.out_features) == (int, 5)
    for value in (True, np.bool_(True), 2.0, np.float32(2), torch.tensor([2])):
        with pytest.raises(ValueError, match="num_classes: got"):
            network.reset_classifier(value)  # type: ignore[arg-type]


def test_arguments_of_methods(narrow: Narrow, tmp_path: Any) -> None:
    network, x = narrow(dtype=torch.float32), torch.randn(1, 3, 64, 64)
    maps = network.forward_intermediates(x, intermediates_only=True)
    for indices in (np.int64(2), np.array([2, -1]), [np.int8(2), torch.tensor(3)], torch.tensor([2, 3])):
        found = network.forward_intermediates(x, indices=indices, intermediates_only=True)  # type: ignore[call-overload]
        assert len(found) == 2
        assert all(map(torch.equal, found, maps[2:]))
    for wrong in (True, np.True_, [True], [1.0], 1.0, "2", [None], np.array([0.5])):
        with pytest.raises(ValueError, match="indices: got"):
            network.forward_intermediates(x, indices=wrong)  # type: ignore[call-overload]
    frozen = freeze(network, torch.float32, max_graphs=np.int64(2), mean=np.array([0.5] * 3), std=np.float32([0.5] * 3))  # type: ignore[arg-type]
    assert type(frozen._options.max_graphs) is int
    size = np.array([32, 64])
    written = effformer.export(network, tmp_path / "n.pt2", size=tuple(size))
    assert written.images == ("batch", 3, 32, 64)
    assert {type(side) for side in written.images[1:]} == {int}
    check_rising("out_indices", [np.int64(0), torch.tensor(2)], range(4))
    with pytest.raises(ValueError, match="out_indices: got"):
        check_rising("out_indices", [np.bool_(False), 2], range(4))
