"""Settings of Think-at-Hard, read from both generations of `tah_config.json` and from the names older texts use."""

import logging
from typing import Any, Literal

from pydantic import Field, model_validator

from lab.config import Settings
from lab.errors import SettingsError, unknown

log = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")
ALIASES = {"FixedLabelIterDecider": "IterLabelDecider"}
DEAD = {
    "SmoothTransitionIterDecider": "an iteration decider",
    "InterleavedIterDecider": "an iteration decider",
    "NoisyWrapperIterDecider": "an iteration decider",
    "CombinedLoss": "a loss",
    "cascade": "an adapter",
    "multilora": "an adapter",
}
OLD_KEYS = {
    "input_updater",
    "output_updater",
    "output_updater_kwargs",
    "iter_label_generator",
    "iter_label_generator_kwargs",
    "iter_attention_mode",
}


class MLPSettings(Settings):
    """The learned decider (paper sec. 3.2; spec 2.4)."""

    topk: int = Field(100, ge=1)
    hidden_states_size: int = Field(2048, ge=1)
    hidden_states_layer_nums: list[int] = Field([2, 10, 18, 26], min_length=1)
    hidden_dims: list[int] = Field([512] * 6, min_length=1)
    expansion_factor: int = Field(4, ge=1)
    dropout_rate: float = Field(0.1, ge=0, lt=1)
    normalize_input: bool = False
    threshold: float = Field(0.5, ge=0, le=1)
    max_iter: int | None = Field(None, ge=1)
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    load_path: str = ""


class LabelSettings(Settings):
    """The decider that follows labels of the data set."""

    max_iter: int | None = Field(None, ge=1)
    threshold: float = Field(0.5, ge=0, le=1)
    label_type: Literal["mismatch", "divergent"] = "mismatch"


class OracleSettings(Settings):
    """The decider that compares the first pass with a reference model's greedy token."""

    model: str = ""
    max_iter: int | None = Field(None, ge=1)
    false_positive_rate: float = Field(0.0, ge=0, le=1)
    false_negative_rate: float = Field(0.0, ge=0, le=1)
    seed: int = 0


class AlwaysSettings(Settings):
    """`continue` or `stop` for every token, keeping the base decider's logits."""

    mode: Literal["continue", "stop"] = "continue"
    max_iter: int | None = Field(None, ge=1)
    base_iter_decider_cls: str = "TrivialIterDecider"
    base_iter_decider_kwargs: dict[str, Any] = {}


class TrivialSettings(Settings):
    """Every token stops after one pass."""

    max_iter: int | None = Field(None, ge=1)


DECIDERS: dict[str, type[Settings]] = {
    "IterLabelDecider": LabelSettings,
    "MLPIterDecider": MLPSettings,
    "OracleDynamicIterDecider": OracleSettings,
    "AlwaysWrapperIterDecider": AlwaysSettings,
    "TrivialIterDecider": TrivialSettings,
}


class UpdaterSettings(Settings):
    """What a continuing token's next pass reads: the soft embedding of its `topk` best tokens, or its last hidden state."""

    topk: int = Field(100, ge=1)
    use_hidden_states: bool = False


class LoraSettings(Settings):
    """LoRA of the passes after the first (spec 2.3)."""

    r: int = Field(32, ge=1)
    lora_alpha: float = Field(64, gt=0)
    lora_dropout: float = Field(0.1, ge=0, lt=1)
    target_modules: str | list[str] = "all-linear"
    bias: Literal["none"] = "none"
    base_grad: bool = True
    adapter_grad: bool = True


class NextTokenSettings(Settings):
    """Weight of tokens thought about twice relative to the others; `hard_token_ratio` is their share in the training set."""

    hard_token_relative_weight: float = Field(1.0, gt=0)
    hard_token_ratio: float = Field(0.0, ge=0, le=1)


class DeciderLossSettings(Settings):
    """Weighted binary cross-entropy of the decider (spec 2.6, 7.3)."""

    pos_weight: float = Field(1.0, gt=0)
    skip_last_iter: bool = True
    max_iter: int | None = Field(None, ge=1)
    loss_scaling: Literal["mean", "official"] = "mean"


class EmptySettings(Settings):
    """No options."""


LOSSES: dict[str, type[Settings]] = {
    "NextTokenPredLoss": NextTokenSettings,
    "IterDeciderLoss": DeciderLossSettings,
    "ConsistencyLoss": EmptySettings,
}
GENERATORS = {"FixedIterLabelGenerator": "data", "DynamicMismatchIterLabelGenerator": "mismatch", "MaxIterLabelGenerator": "max"}
INPUTS = ("TrivialUpdater", "AdditiveUpdater")
OUTPUTS = ("AdditiveLogitsUpdater", "NoneUpdater")


class TahConfig(Settings):
    """Everything that `tah_config.json` can say, both generations, with every name resolved and every option checked."""

    embedding_key: str = "model.embed_tokens"
    max_iter: int = Field(2, ge=1)
    iter_decider: str = "IterLabelDecider"
    iter_decider_kwargs: dict[str, Any] = {}
    eval_iter_decider: str = "iter_decider"
    eval_iter_decider_kwargs: dict[str, Any] = {}
    input_updater: str = "TrivialUpdater"
    input_updater_kwargs: dict[str, Any] = {}
    output_updater: str = "AdditiveLogitsUpdater"
    output_updater_kwargs: dict[str, Any] = {}
    iter_label_generator: str = "FixedIterLabelGenerator"
    iter_label_generator_kwargs: dict[str, Any] = {}
    iter_attention_mode: Literal["duo", "root", "same_iter"] = "duo"
    adapter: Literal["lora", "none"] = "lora"
    adapter_kwargs: dict[str, Any] = {}
    train_loss: str = "NextTokenPredLoss"
    train_loss_kwargs: dict[str, Any] = {}
    eval_loss: str = "NextTokenPredLoss"
    eval_loss_kwargs: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, values: dict[str, Any]) -> dict[str, Any]:
        values = {key: ALIASES.get(value, value) if isinstance(value, str) else value for key, value in values.items()}
        reject_dead(values)
        if values.get("input_updater") == "AdditiveUpdater":
            log.info("AdditiveUpdater is read as TrivialUpdater (soft embedding in) with AdditiveLogitsUpdater (logits added up).")
            values |= {"input_updater": "TrivialUpdater", "output_updater": "AdditiveLogitsUpdater"}
        return values

    @model_validator(mode="after")
    def _known(self) -> "TahConfig":
        for kind, name, options in (
            ("iteration decider", self.iter_decider, DECIDERS),
            ("iteration decider", self.eval_iter_decider, {"iter_decider", *DECIDERS}),
            ("input updater", self.input_updater, INPUTS),
            ("output updater", self.output_updater, OUTPUTS),
            ("iteration label generator", self.iter_label_generator, GENERATORS),
            ("loss", self.train_loss, LOSSES),
            ("loss", self.eval_loss, LOSSES),
        ):
            if name not in options:
                raise unknown(kind, name, options)
        for check in (self.decider, self.eval_decider, self.updater, self.loss):
            check()
        if self.adapter == "lora":
            self.lora()
        return self

    def decider(self) -> tuple[str, Settings]:
        """Class name and settings of the training decider; its cap is filled in from `max_iter` where absent (7.2.1)."""
        return decider_settings(self.iter_decider, self.iter_decider_kwargs, self.max_iter)

    def eval_decider(self) -> tuple[str, Settings]:
        """Class name and settings of the decider used in evaluation."""
        if self.eval_iter_decider == "iter_decider":
            return decider_settings(self.iter_decider, {**self.iter_decider_kwargs, **self.eval_iter_decider_kwargs}, self.max_iter)
        return decider_settings(self.eval_iter_decider, self.eval_iter_decider_kwargs, self.max_iter)

    def updater(self) -> UpdaterSettings:
        """Settings of the next pass's input."""
        return UpdaterSettings.check(**self.input_updater_kwargs)

    def lora(self) -> LoraSettings:
        """Settings of the adapter."""
        return LoraSettings.check(**self.adapter_kwargs)

    def loss(self, training: bool = True) -> tuple[str, Settings]:
        """Name and settings of the loss."""
        name, kwargs = (self.train_loss, self.train_loss_kwargs) if training else (self.eval_loss, self.eval_loss_kwargs)
        return name, LOSSES[name].check(**kwargs)

    def to_json(self, generation: str = "new") -> dict[str, Any]:
        """The content of `tah_config.json` in the official spelling; old-generation keys are added only where asked or needed."""
        default = {
            "iter_attention_mode": "duo",
            "output_updater": "AdditiveLogitsUpdater",
            "iter_label_generator": "FixedIterLabelGenerator",
        }
        old = generation == "old" or any(getattr(self, key) != value for key, value in default.items())
        skip = set() if old else OLD_KEYS
        return {name: _encode(name, getattr(self, name)) for name in type(self).model_fields if name not in skip}


def decider_settings(name: str, kwargs: dict[str, Any], max_iter: int) -> tuple[str, Settings]:
    """The decider's canonical class name and its checked settings with `max_iter` filled in."""
    name = ALIASES.get(name, name)
    reject_dead({"iter_decider": name})
    if name not in DECIDERS:
        raise unknown("iteration decider", name, DECIDERS)
    settings = DECIDERS[name].check(**kwargs)
    return name, settings if settings.max_iter else settings.but(max_iter=max_iter)


def reject_dead(values: dict[str, Any]) -> None:
    """Raise SettingsError for names that documents mention and no released code ever had."""
    for value in values.values():
        if isinstance(value, str) and value in DEAD:
            raise SettingsError(f"{value!r} is mentioned as {DEAD[value]} of Think-at-Hard but no released code has it; remove it.")
    if values.get("use_iter_embedding"):
        raise SettingsError("'use_iter_embedding' is mentioned in recipes but no released code reads it; remove it or set it to false.")


def read_config(values: dict[str, Any]) -> TahConfig:
    """The settings in the parsed content of a `tah_config.json` of either generation.

    An old config without an `output_updater` adds nothing (the default of that generation), a new one adds the logits up.
    Keys that neither generation reads are logged and left out. Raises SettingsError for dead names and wrong values.
    """
    reject_dead(values)
    values = {key: _decode(value) for key, value in values.items()}
    old = bool(OLD_KEYS & set(values))
    if old and not values.get("output_updater") and values.get("input_updater") != "AdditiveUpdater":
        values["output_updater"] = "NoneUpdater"
    if values.get("adapter", "lora") is None:
        values["adapter"] = "none"
    ignored = sorted(set(values) - set(TahConfig.model_fields) - {"use_iter_embedding"})
    if ignored:
        log.warning("tah_config.json has keys that nothing reads: %s.", ", ".join(ignored))
    return TahConfig.check(**{key: value for key, value in values.items() if key in TahConfig.model_fields and value is not None})


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        if value.get("__dtype__"):
            return str(value["__str__"]).removeprefix("torch.")
        if value.get("__type__"):
            return value["__name__"]
        return {key: _decode(item) for key, item in value.items()}
    return [_decode(item) for item in value] if isinstance(value, list) else value


def _encode(name: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _encode(key, item) for key, item in value.items()}
    if value in DTYPES and name == "dtype":
        return {"__dtype__": True, "__str__": f"torch.{value}"}
    return value
