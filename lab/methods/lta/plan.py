"""What a recipe trains, from its parameters alone; SoftCoT's recipes are of the same notebook."""

from collections.abc import Iterator
from typing import Any

from lab.estimate import Training, of
from lab.methods.lta.config import LtaSettings
from lab.methods.lta.model import ThoughtParts
from lab.methods.lta.toy import SIZES
from lab.models.plan import planned_config


def trainings(settings: dict[str, dict[str, Any]]) -> Iterator[Training]:
    """The thought generator under its frozen base."""
    v = settings["train"]
    toy = v["large_model_id"] == "toy"
    rows = v["batch_size"] * v["gradient_accumulation_steps"] * v["processes"]
    small = v["small_model_id"]
    generator = "assistant" if v["use_assistant_model"] else v["generator"]
    width = planned_config(small).hidden_size if small and generator == "assistant" else 64
    own = LtaSettings.check(generator=generator, num_thought_tokens=v["num_thought_tokens"], inner=256 if toy else 0, assistant_width=width)
    how = {"micro_batch": v["batch_size"], "processes": 1 if toy else v["processes"], "sharding": v["sharding"], "bf16": not toy}
    about = {"parts": lambda config: ThoughtParts(own, config, 1.0), "frozen": True, "passes": 1.5, "shape": SIZES if toy else {}}
    name, arms = "toy:qwen3" if toy else v["large_model_id"], len(v["arms"]) if toy else 1
    length = {"steps": 0 if v["n_epochs"] else arms * v["steps"], "epochs": v["n_epochs"], "examples": v["k_shot"]}
    yield of("train", how, name, v["batch_size"] if toy else rows, "" if toy else v["task_name"], **length, **about)
