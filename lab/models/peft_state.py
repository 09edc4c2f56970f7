"""Low-rank adapters by peft: put around a backbone; and saved weights read: own names, pairs added to what they adapt."""

from collections.abc import Mapping, Sequence
from typing import Any

from lab.errors import CheckpointError, SettingsError
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


def wrapped(body: State, pairs: State) -> State:
    """A backbone's weights and low-rank pairs (under the names of an adapter file) as peft's model holds them: what `merged` reads."""
    stems = {key.split(".lora_")[0] for key in pairs}
    split = {key: f"{WRAPPED}{key}".rpartition(".") for key in body}
    state = {f"{stem}.base_layer.{kind}" if stem in stems else f"{WRAPPED}{key}": body[key] for key, (stem, _, kind) in split.items()}
    return state | {key.replace("_A.", "_A.default.").replace("_B.", "_B.default."): value for key, value in pairs.items()}


def with_adapters(backbone, rank: int, alpha: float, targets: Sequence[str], dropout: float = 0.0, **more: Any) -> Any:
    """`backbone` wrapped by peft, frozen but for adapters on the modules `targets`; itself where `rank` is 0.

    Args:
        more: further settings of peft's LoraConfig.

    SettingsError where the backbone has none of `targets`.
    """
    if rank == 0:
        return backbone
    from peft import LoraConfig, get_peft_model

    shape = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "target_modules": list(targets), "bias": "none"}
    try:
        return get_peft_model(backbone, LoraConfig(**shape, fan_in_fan_out=backbone.config.model_type == "gpt2", **more))
    except ValueError as error:
        raise SettingsError(f"LoRA found none of {', '.join(targets)} in this backbone; name modules that it has.") from error
