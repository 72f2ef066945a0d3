from typing import Any


def get_model_format(model_conf: Any) -> str:
    return "torch"
