"""Reasons why weights are not plain tensors: the tool that left its mark on them, and the way back."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..model.wrappers import class_of, is_plain_tensor

# Parts of names -> the tool, and the way to plain weights.
_MARKS = {
    r"\._packed_params|\.zero_point$": "quantised: take the weights from before it was quantised",
    r"weight_(orig|mask)$": "pruned: torch.nn.utils.prune.remove makes the network plain before it is saved",
    r"\.parametrizations\.": "parametrised: torch.nn.utils.parametrize.remove_parametrizations makes the network plain",
    r"weight_[gv]$": "weight-normalised: torch.nn.utils.remove_weight_norm makes the network plain before it is saved",
    r"_flat_param": "of FSDP, sharded: save what torch.distributed.checkpoint.state_dict.get_model_state_dict gathers",
    r"\.(lora_[AB]|base_layer)\.": "of LoRA adapters: merge them first, by merge_and_unload()",
}


def why_not_plain(state: Mapping[str, Tensor]) -> str | None:
    """The reason why a state dict holds no plain weights of a network, and the way out; None where it may."""
    for pattern, how in _MARKS.items():
        if (key := next((key for key in state if re.search(pattern, key)), None)) is not None:
            return f"{key} shows that the network was {how}"
    for key, value in state.items():
        if value.is_quantized or not is_plain_tensor(value):
            kind = "quantised" if value.is_quantized else class_of(value)
            layout = "" if value.is_quantized or value.layout == torch.strided else f" in {value.layout}"
            return f"{key} is {kind}{layout}, allowed are ordinary dense tensors: convert it first"
        if value.is_meta:
            return f"{key} is on the meta device, without data"
        if value.numel() == 0:
            return f"{key} is empty, as DeepSpeed's ZeRO-3 leaves it: zero_to_fp32.py gathers the weights"
    return None
