"""`list_models`: the patterns of timm's function of that name."""

from __future__ import annotations

from typing import Any

import pytest

import effformer
from effformer.checkpoints import hub

L1, L3, L7 = "efficientformer_l1", "efficientformer_l3", "efficientformer_l7"


@pytest.mark.parametrize("pretrained", [False, True])
@pytest.mark.parametrize(
    "pattern", ["", "*", "*l3", "l3", "*_l[13]", "EFF*", "?*7", "no*", [], ["*1", "*7"], ("x", L3), [""]], ids=str
)
def test_the_names_are_those_that_timm_lists(timm: Any, pattern: str | list[str], pretrained: bool) -> None:
    expected = timm.list_models(pattern, module="efficientformer", pretrained=pretrained)
    assert effformer.list_models(pattern, pretrained=pretrained) == [name.partition(".")[0] for name in expected]


def test_pretrained_lists_models_with_weights_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(hub.PRETRAINED, L3)
    assert effformer.list_models() == [L1, L3, L7]
    assert effformer.list_models("*", pretrained=True) == [L1, L7]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"pattern": 3}, r"pattern: got 3 \(int\), allowed is a string, or several"),
        ({"pattern": ["*", None]}, "pattern: got .*None.*allowed is a string, or several"),
        ({"pattern": None}, "pattern: got None"),
        ({"pretrained": "yes"}, "pretrained: got 'yes' .*allowed is True or False"),
    ],
    ids=str,
)
def test_wrong_arguments(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        effformer.list_models(**keywords)
