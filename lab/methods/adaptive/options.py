"""The option strings of the paper's scripts, `token/token/…`, as data, and what they resolve to (distill.md 3.2).

Tokens are read from left to right, later ones win, spaces and empty places are ignored. `resolve` returns the official field
names, so that a resolved string can be laid beside the published one; `Resolved` turns them into this library's settings.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lab.errors import SettingsError, unknown
from lab.methods.adaptive.config import Distil

Values = dict[str, Any]
VARIABLES = (
    "model_path_or_repo",
    "latent_settings_options",
    "lora_config_options",
    "training_config_options",
    "val_config_options",
    "grpo_config_options",
    "dir_name",
)
SPECIAL_MODULES = [f"_{name}_embed{side}" for side in ("", "_in", "_out") for name in ("start", "end", "continue", "stop")]
SPECIAL_MODULES = ["recurrent_filter", *(n for n in SPECIAL_MODULES if n not in ("_continue_embed_in", "_stop_embed_in", "_end_embed_out"))]


def number(text: str) -> float | int:
    """The number in a token: `0p1` is 0.1, `30k` is 30,000, `1e-4` as it stands."""
    text = text.replace("p", ".")
    value = float(text[:-1]) * 1000 if text.endswith("k") else float(text)
    return int(value) if value == int(value) and "e-" not in text and "." not in text else value


_N = r"(\d+k?)"
_X = r"(\d+(?:p\d+)?(?:e-\d+)?)"
Rule = tuple[str, Callable[..., Values]]

_LATENT: dict[str, Values] = {f"recurrent_filter_{name}": {"recurrent_filter_mode": name} for name in ("MLP", "linear", "linear_ln")}
_LATENT |= {f"recurrent_filter_{name}": {"recurrent_filter_mode": name} for name in ("linear_ECF", "SRE")}
_LATENT |= {"recurrent_filter_none": {"recurrent_filter_mode": None}}
_LATENT |= {name: {name: True} for name in ("detach_binary_head_inputs", "add_latent_to_end", "debug_mode")}

_LORA: dict[str, Values] = {
    "llama_target_modules": {"target_modules": [f"{name}_proj" for name in ("q", "k", "v", "o", "up", "down", "gate")]},
    "gpt2_target_modules": {"target_modules": ["c_attn", "c_proj", "c_fc"]},
    "latent_modules_to_save": {"modules_to_save": SPECIAL_MODULES},
}
_LORA_RULES: list[Rule] = [
    (rf"r_{_N}", lambda n: {"r": number(n)}),
    (rf"alpha_{_N}", lambda n: {"lora_alpha": number(n)}),
    (rf"dropout_{_X}", lambda x: {"lora_dropout": float(number(x))}),
]

_TRAINING: dict[str, Values] = {
    "gsm8k-aug": {"data_name": "gsm8k-aug"},
    "gsm8k-aug-nl": {"data_name": "gsm8k-aug-nl"},
    "no_cot": {"data_mode": "no cot"},
    "remove_last_reasoning_step": {"remove_last_reasoning_step": True},
    "remove_negative_answers": {"additional_trainset_kwargs": {"remove_negative_answers": True}},
    "codi_loss": {"codi_loss": True},
    "mean_reasoning_loss": {"mean_reasoning_loss": True},
    "intermediate_block_llama_3_12": {"intermediate_block_latent_loss_range": [3, 12]},
    "intermediate_block_gpt2_2_9": {"intermediate_block_latent_loss_range": [2, 9]},
    "calc_smooth_l1": {"latent_loss_calc_mode": "smooth_l1"},
    "calc_mean_l2": {"latent_loss_calc_mode": "mean_l2"},
    "no_latent_loss_norm": {"latent_loss_norm_mode": "none"},
    "mask_latent_reasoning_labels": {"mask_latent_reasoning_labels": True},
    "shift_target_token_one": {"shift_target_token_one": True},
    "no_decay_some_params": {"no_decay_some_params": True},
    "gc": {"use_gradient_checkpointing": True},
    "no_gc": {"use_gradient_checkpointing": False, "use_gradient_checkpointing_if_necessary": False},
    "gc_if_necessary": {"use_gradient_checkpointing_if_necessary": True},
}
_TRAINING |= {f"norm_{how}": {"latent_loss_norm_mode": how} for how in ("layerwise_std", "layerwise_avg_l2", "std", "avg_l2")}
_TRAINING_RULES: list[Rule] = [
    (r"slice_proportion_(\d+)p", lambda n: {"slice_proportion": int(n) / 100}),
    (r"latent_flat_(\d+)", lambda n: _thoughts(0, None, int(n), int(n))),
    (r"latent_plus_(\d+)_by_(\d+)_max_(\d+)", lambda bias, factor, most: _thoughts(int(factor), int(bias), None, int(most))),
    (rf"codi_loss_{_X}", lambda x: {"codi_loss": number(x)}),
    (rf"mean_reasoning_loss_{_X}", lambda x: {"mean_reasoning_loss": number(x)}),
    (rf"batch_size_{_N}", lambda n: {"batch_size": number(n)}),
    (rf"steps_{_N}", lambda n: {"steps": number(n)}),
    (rf"epochs_{_N}", lambda n: {"epochs": number(n)}),
    (rf"lr_{_X}", lambda x: {"lr": float(number(x))}),
    (rf"weight_decay_{_X}", lambda x: {"weight_decay": float(number(x))}),
    (rf"max_grad_norm_{_X}", lambda x: {"max_grad_norm": float(number(x))}),
    (rf"cosine-warmup_{_N}", lambda n: {"scheduler_name": "cosine", "scheduler_num_warmup_steps": number(n)}),
    (rf"val_period_{_N}", lambda n: {"val_period": number(n)}),
    (rf"save_checkpoint_period_{_N}", lambda n: {"save_checkpoint_period": number(n)}),
]

_VAL: dict[str, Values] = {
    "gsm8k-aug-val": {"data_name": "gsm8k-aug", "split": "validation"},
    "gsm8k-aug-test": {"data_name": "gsm8k-aug", "split": "test"},
    "gsm8k-aug-nl-val": {"data_name": "gsm8k-aug-nl", "split": "validation"},
    "latent_thinking": {"latent_thinking": True},
}
_VAL_RULES: list[Rule] = [(r"latent_thought_count_override_(\d+)", lambda n: {"latent_thought_count_override": int(n)})]

_GRPO: dict[str, Values] = {
    "standard-1a": {
        **{"do_train": True, "warmup_steps": 1000, "gradient_checkpointing": False, "bf16": True, "max_completion_length": 40},
        **{"ddp_backend": "nccl", "ddp_find_unused_parameters": False, "logging_first_step": True, "report_to": "tensorboard"},
        **{"disable_tqdm": True, "metric_for_best_model": "custom_eval/score", "greater_is_better": True, "do_eval": True},
        **{"eval_on_start": True, "load_best_model_at_end": True, "save_total_limit": 3},
    },
    "cosine_lr": {"lr_scheduler_type": "cosine"},
    "constant_lr": {"lr_scheduler_type": "constant_with_warmup"},
    "no_save_limit": {"save_total_limit": None},
}
_GRPO_RULES: list[Rule] = [
    (rf"lr_{_X}", lambda x: {"learning_rate": float(number(x))}),
    (rf"weight_decay_{_X}", lambda x: {"weight_decay": float(number(x))}),
    (rf"beta_{_X}", lambda x: {"beta": float(number(x))}),
    (rf"temp_{_X}", lambda x: {"temperature": float(number(x))}),
    (rf"steps_{_N}", lambda n: {"max_steps": number(n)}),
    (rf"eval_steps_{_N}", lambda n: {"eval_strategy": "steps", "eval_steps": number(n)}),
    (rf"save_steps_{_N}", lambda n: {"save_steps": number(n)}),
    (rf"num_gen_{_N}", lambda n: {"num_generations": number(n)}),
]

_HUB = "Lapisbird/Llama-adaLR-model"
_RL: dict[str, Values] = {
    "model-latent-6": {"is_latent": True, "model_path_or_repo": f"{_HUB}-latent-6"},
    "model-latent-6-by-1": {"is_latent": True, "model_path_or_repo": f"{_HUB}-latent-6-by-1"},
    "rel_len_acc_req_ALL": {"relative_length_accuracy_requirement": 1},
    "rel_len_reward_same": {"relative_length_reward": "same"},
}
_RL_RULES: list[Rule] = [
    (r"slice_proportion_(\d+)p", lambda n: {"slice_proportion": int(n) / 100}),
    (rf"batch_size_{_N}", lambda n: {"batch_size": number(n)}),
    (rf"binary_head_temp_{_X}", lambda x: {"binary_head_temp": number(x)}),
    (rf"rel_len_penalty_{_X}", lambda x: {"relative_length_penalty": float(number(x))}),
    (rf"rel_len_reward_{_X}", lambda x: {"relative_length_reward": float(number(x))}),
]

EXAMPLES = {
    "latent settings": [],
    "LoRA": ["r_8", "r_32", "r_128", "alpha_8", "alpha_32", "alpha_128", "alpha_256", "dropout_0p1"],
    "training": [f"slice_proportion_{n}p" for n in (75, 85)]
    + ["latent_flat_2", "latent_flat_6", "latent_plus_5_by_1_max_10", "latent_plus_6_by_1_max_10", "latent_plus_4_by_2_max_8"]
    + [f"codi_loss_{n}" for n in (10, 20, 100)]
    + [f"mean_reasoning_loss_{n}" for n in ("0p1", 4, 5, 10, 20, 40, 100)]
    + ["batch_size_128", "steps_30k", "epochs_1", "lr_1e-4", "lr_8e-4", "weight_decay_0", "weight_decay_0p1", "max_grad_norm_2"]
    + ["cosine-warmup_900", "val_period_200", "save_checkpoint_period_4k"],
    "validation": ["latent_thought_count_override_6"],
    "GRPO": [f"lr_{x}" for x in ("8e-4", "1e-4", "3e-5", "1e-5", "1e-6")]
    + [f"weight_decay_{x}" for x in ("0p1", "1e-3", "1e-5")]
    + ["beta_0p04", "beta_1e-3", "temp_0p1", "temp_0p5", "steps_15k", "steps_30k", "steps_60k"]
    + [f"eval_steps_{n}" for n in (20, 200, 500)]
    + ["save_steps_40", "save_steps_200", "save_steps_500", "save_steps_1k", "num_gen_16"],
    "RL": ["slice_proportion_15p", "slice_proportion_25p", "batch_size_64", "batch_size_128"]
    + [f"binary_head_temp_{n}" for n in (1, 2, 4, 10)]
    + [f"rel_len_penalty_{x}" for x in ("0p1", "1e-1", "1e-2", "1e-3", "1e-4", "1e-5", "5e-5", "0")]
    + [f"rel_len_reward_{x}" for x in ("1", "1e-1", "1e-2", "1e-3")],
}
_TABLES: dict[str, tuple[dict[str, Values], list[Rule]]] = {
    "latent settings": (_LATENT, []),
    "LoRA": (_LORA, _LORA_RULES),
    "training": (_TRAINING, _TRAINING_RULES),
    "validation": (_VAL, _VAL_RULES),
    "GRPO": (_GRPO, _GRPO_RULES),
    "RL": (_RL, _RL_RULES),
}
_SFT_DEFAULTS: Values = {
    **{"data_name": None, "data_mode": "cot", "slice_proportion": None, "latent_thinking_factor": None, "latent_thinking_bias": None},
    **{"min_latent_thinking_steps": None, "max_latent_thinking_steps": None, "mask_latent_reasoning_labels": False},
    **{"remove_last_reasoning_step": False, "shift_target_token_one": False, "max_training_tokens": 512},
    **{"additional_trainset_kwargs": {}, "epochs": None, "steps": None, "batch_size": 128, "scheduler_name": None},
    **{"scheduler_num_warmup_steps": None, "codi_loss": False, "mean_reasoning_loss": False, "latent_loss_calc_mode": None},
    **{"latent_loss_norm_mode": None, "intermediate_block_latent_loss_range": None, "lr": 1e-4, "weight_decay": 0.01},
    **{"max_grad_norm": 1.0, "no_decay_some_params": False, "use_gradient_checkpointing": False},
    **{"use_gradient_checkpointing_if_necessary": False, "initial_micro_batch_size": None, "num_proc": 12, "num_workers": 4, "seed": 42},
    **{"torch_dtype_str": "bf16", "val_period": None, "save_checkpoint_period": None, "keep_only_last_checkpoint": True},
}
_VAL_DEFAULTS: Values = {
    **{"data_name": None, "split": "validation", "latent_thinking": False, "latent_thought_count_override": None},
    **{"max_new_tokens": 512, "batch_size": None, "num_proc": 12, "num_workers": 0},
}
_RL_DEFAULTS: Values = {
    **{"is_latent": False, "model_path_or_repo": None, "binary_head_temp": None, "data_name": "gsm8k-aug", "append_start_token": True},
    **{"max_prompt_tokens": 100, "slice_proportion": None, "batch_size": None, "format_penalty_weight": 1.0},
    **{"accuracy_reward_weight": 1.0, "relative_length_penalty": None, "relative_length_accuracy_requirement": None},
    **{"relative_length_reward": None, "val_data_name": "gsm8k-aug", "num_proc": 12},
}


def _thoughts(factor: int, bias: int | None, least: int | None, most: int | None) -> Values:
    counts = {"latent_thinking_factor": factor, "latent_thinking_bias": bias}
    return {"data_mode": "latent", **counts, "min_latent_thinking_steps": least, "max_latent_thinking_steps": most}


def tokens(kind: str) -> list[str]:
    """Every published token of a kind (`latent settings`, `LoRA`, `training`, `validation`, `GRPO`, `RL`)."""
    return [*_TABLES[kind][0], *EXAMPLES[kind], "default"]


def parse(kind: str, text: str) -> Values:
    """The values a string of tokens sets; SettingsError with the nearest token for an unknown one."""
    table, rules = _TABLES[kind]
    values: Values = {}
    for token in filter(None, (part.strip() for part in text.split("/"))):
        values |= _value(kind, token, table, rules)
    return values


def _value(kind: str, token: str, table: dict[str, Values], rules: list[Rule]) -> Values:
    if token == "default":
        return {}
    if token in table:
        return table[token]
    for pattern, make in rules:
        if found := re.fullmatch(pattern, token):
            return make(*found.groups())
    raise unknown(f"{kind} option", token, tokens(kind))


# ---- resolved, with the official field names ----


def resolve_sft(text: str) -> Values:
    """The training settings of an SFT run; SettingsError for what contradicts itself."""
    v = {**_SFT_DEFAULTS, **parse("training", text)}
    if not v["data_name"]:
        raise SettingsError("The training options name no data set: add gsm8k-aug or gsm8k-aug-nl.")
    if (v["steps"] is None) == (v["epochs"] is None):
        given = "neither" if v["steps"] is None else "both"
        raise SettingsError(f"Give either steps_… or epochs_… (now {given}).")
    _check_latent(v)
    if v["slice_proportion"] is not None and not 0 < v["slice_proportion"] <= 1:
        raise SettingsError(f"slice_proportion {v['slice_proportion']:g} must lie between 0 and 1.")
    if v["batch_size"] & (v["batch_size"] - 1):
        raise SettingsError(f"batch_size_{v['batch_size']}: the batch must be a power of two.")
    return v


def _check_latent(v: Values) -> None:
    latent, weighted = v["data_mode"] == "latent", bool(v["codi_loss"]) or bool(v["mean_reasoning_loss"])
    if latent != weighted:
        missing = "a latent loss: add codi_loss_20 or mean_reasoning_loss_20" if latent else "thoughts: add latent_flat_6 or another"
        raise SettingsError(f"Thoughts and a latent loss go together; these options lack {missing}.")
    for field, hint in (("latent_loss_calc_mode", "calc_smooth_l1"), ("latent_loss_norm_mode", "norm_layerwise_std")):
        if latent != (v[field] is not None):
            raise SettingsError(
                f"A latent loss needs a distance and a scale: add {hint}." if latent else f"{v[field]} needs a latent loss."
            )
    if v["intermediate_block_latent_loss_range"] and not latent:
        raise SettingsError("intermediate_block_… chooses layers of a latent loss, and there is none.")
    if latent and (v["use_gradient_checkpointing"] or v["use_gradient_checkpointing_if_necessary"]):
        raise SettingsError("Gradient checkpointing does not work where thoughts are fed back: leave out gc and gc_if_necessary.")


def resolve_val(text: str) -> Values:
    """The validation settings; SettingsError without a data set, or with a count for a model that does not think."""
    v = {**_VAL_DEFAULTS, **parse("validation", text)}
    if not v["data_name"]:
        raise SettingsError("The validation options name no data set: add gsm8k-aug-val.")
    if v["latent_thought_count_override"] and not v["latent_thinking"]:
        raise SettingsError("latent_thought_count_override_… needs latent_thinking.")
    return v


def resolve_lora(text: str) -> Values:
    """The LoRA settings; None-like ({}) for an empty string (everything is trained)."""
    v = parse("LoRA", text)
    if v and (missing := [name for name in ("target_modules", "r", "lora_alpha") if name not in v]):
        raise SettingsError(f"LoRA needs {', '.join(missing)} too: add llama_target_modules, r_128 and alpha_32, or leave all of them out.")
    return v


def resolve_latent(text: str) -> Values | None:
    """The settings of thinking; None for an empty string (a text model)."""
    v = parse("latent settings", text)
    return v or None


def resolve_rl(text: str) -> Values:
    """The RL data and rewards; SettingsError for a length reward without a requirement."""
    v = {**_RL_DEFAULTS, **parse("RL", text)}
    if v["relative_length_reward"] is not None and v["relative_length_accuracy_requirement"] is None:
        raise SettingsError("rel_len_reward_… is paid below an accuracy requirement: add rel_len_acc_req_ALL.")
    if v["batch_size"] is None:
        raise SettingsError("The RL options name no batch size: add batch_size_128.")
    return v


def resolve_grpo(text: str) -> Values:
    """The GRPO settings; SettingsError where checkpoints and evaluations do not fall together."""
    v = parse("GRPO", text)
    every, save = v.get("eval_steps"), v.get("save_steps")
    if every and save and save % every:
        raise SettingsError(f"save_steps ({save}) must be a multiple of eval_steps ({every}): the best model is chosen at evaluations.")
    return v


# ---- as this library's settings ----


@dataclass(frozen=True)
class Resolved:
    """The option strings of one SFT run, resolved."""

    training: Values
    latent: Values | None
    lora: Values
    val: Values

    @classmethod
    def of(cls, training: str, latent: str = "", lora: str = "", val: str = "") -> "Resolved":
        """Resolves the four strings and checks that they fit together."""
        found = cls(resolve_sft(training), resolve_latent(latent), resolve_lora(lora), resolve_val(val))
        if found.training["data_mode"] == "latent" and found.latent is None:
            raise SettingsError("These training options think, but latent_settings_options is empty: set it to recurrent_filter_MLP.")
        if found.latent is not None and found.training["data_mode"] != "latent":
            raise SettingsError("latent_settings_options is for models that think; leave it empty for CoT and no-CoT.")
        return found

    @property
    def distil(self) -> Distil:
        """What is learned from."""
        v = self.training
        return Distil.check(
            mode=v["data_mode"],
            sentences=v["data_name"].endswith("-nl"),
            remove_last_step=v["remove_last_reasoning_step"],
            remove_negative=v["additional_trainset_kwargs"].get("remove_negative_answers", False),
            factor=v["latent_thinking_factor"] or 0,
            bias=v["latent_thinking_bias"] or 0,
            least=v["min_latent_thinking_steps"] or 0,
            most=v["max_latent_thinking_steps"],
            mask_thought_labels=v["mask_latent_reasoning_labels"],
            shift_target=v["shift_target_token_one"],
            longest=v["max_training_tokens"],
            weight_codi=float(v["codi_loss"]),
            weight_mean=float(v["mean_reasoning_loss"]),
            distance=v["latent_loss_calc_mode"] or "",
            scale=v["latent_loss_norm_mode"] or "",
            blocks=v["intermediate_block_latent_loss_range"],
        )

    @property
    def fitting(self) -> Values:
        """The optimisation as fields of `TrainSettings`."""
        v = self.training
        return {
            "steps": v["steps"] or 0,
            "epochs": float(v["epochs"] or 0),
            "global_batch": v["batch_size"],
            "lr": v["lr"],
            "schedule": v["scheduler_name"] or "constant",
            "warmup_steps": v["scheduler_num_warmup_steps"] or 0,
            "weight_decay": v["weight_decay"],
            "decay_all": not v["no_decay_some_params"],
            "clip": v["max_grad_norm"],
            "save_every": v["save_checkpoint_period"] or 0,
            "eval_every": v["val_period"] or 0,
            "seed": v["seed"],
            "bf16": v["torch_dtype_str"] == "bf16",
        }


def of_stage(text: str, kind: str, otherwise: str) -> str:
    """`text` if its tokens are of this kind (`training` or `RL`), `otherwise` if they are of the other or there are none.

    SFT and RL read the same variable of the scripts, training_config_options; a pipeline of both is given one string.
    """
    other = "RL" if kind == "training" else "training"
    if not text.strip():
        return otherwise
    try:
        parse(kind, text)
        return text
    except SettingsError:
        try:
            parse(other, text)
        except SettingsError:
            return text
        return otherwise


def rl_fields(grpo: str, rl: str) -> Values:
    """The two RL strings as fields of `lab.training.settings.RLSettings`; SettingsError where they do not fit together."""
    g, r = resolve_grpo(grpo), resolve_rl(rl)
    samples = g.get("num_generations", 8)
    if r["batch_size"] % samples:
        raise SettingsError(f"batch_size_{r['batch_size']} completions cannot be shared by groups of num_gen_{samples}.")
    if "max_steps" not in g:
        raise SettingsError("The GRPO options name no number of steps: add steps_60k.")
    return {
        "steps": g["max_steps"],
        "prompts": r["batch_size"] // samples,
        "samples": samples,
        "longest": g.get("max_completion_length", 40),
        "temperature": g.get("temperature", 1.0),
        "lr": g.get("learning_rate", 1e-6),
        "schedule": {"cosine": "cosine", "constant_with_warmup": "constant"}.get(g.get("lr_scheduler_type", ""), "linear"),
        "warmup_steps": g.get("warmup_steps", 0),
        "weight_decay": g.get("weight_decay", 0.0),
        "beta": g.get("beta", 0.0),
        "bf16": g.get("bf16", False),
        "eval_every": g.get("eval_steps", 0),
        "save_every": g.get("save_steps", 0),
        "load_best": g.get("load_best_model_at_end", False) and bool(g.get("eval_steps")),
    }


def length_reward(rl: str) -> Values:
    """The length reward of an RL string as fields of `reinforce.LengthReward`."""
    r = resolve_rl(rl)
    needed, reward = r["relative_length_accuracy_requirement"], r["relative_length_reward"]
    return {
        "penalty": r["relative_length_penalty"] or 0.0,
        "requirement": None if needed is None else float(needed),
        "reward": reward if reward in (None, "same") else float(reward),
    }


def shown(values: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Resolved values as rows of a table, those that are off left out."""
    return [{"setting": name, "value": value} for name, value in (values or {}).items() if value not in (None, False, {}, "")]
