"""Weights saved while peft wrapped the model: the backbone's own names, and the low-rank pairs added to what they adapt."""

from collections.abc import Mapping
from typing import Any

from lab.errors import CheckpointError
from lab.models.loading import State

WRAPPED = "base_model.model."


def plain_names(names: Mapping[str, Any]) -> dict[str, Any]:
    """Names (and values) of the backbone's own weights in a wrapped state: without peft's prefix, `base_layer` and adapters."""
    own = {key.removeprefix(WRAPPED).replace(".base_layer.", "."): value for key, value in names.items() if ".lora_" not in key}
    return own


def merged(body: State, alpha: float) -> State:
    """The backbone's weights with every low-rank pair added, `alpha / r · B A` (transposed for GPT-2's (in, out) weights)."""
    state = plain_names(body)
    for key, A in body.items():
        if ".lora_A." not in key:
            continue
        name = key.removeprefix(WRAPPED).split(".lora_A.")[0] + ".weight"
        B = body.get(key.replace(".lora_A.", ".lora_B."))
        if B is None or name not in state:
            raise CheckpointError(f"{key!r} has no partner lora_B or no weight {name!r} to be added to.")
        change = (alpha / A.shape[0]) * (B.float() @ A.float())
        state[name] = state[name].float() + (change if change.shape == state[name].shape and "transformer.h." not in name else change.T)
    return state
