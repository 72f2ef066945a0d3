"""See trainer_common.py."""

from __future__ import annotations

from typing import Any

from .trainer_common import train_common


def evaluation_common(conf: Any, **named: Any) -> None:
    train_common(conf, steps=0, **named)
