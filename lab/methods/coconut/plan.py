"""What a recipe trains, from its parameters alone."""

from collections.abc import Iterator
from typing import Any

from lab.estimate import Training, of


def trainings(settings: dict[str, dict[str, Any]]) -> Iterator[Training]:
    """Every arm, as long as `num_epochs` says (stages that end early make it shorter)."""
    v = settings["train"]
    shape = {"layers": v["layers"]} if v["backbone"].startswith("toy:") else {}
    epochs, thoughts = len(v["arms"]) * (v["num_epochs"] - v["resume"]), v["c_thought"] * v["max_latent_stage"]
    own = {"examples": v["train_problems"], "shape": shape, "thoughts": thoughts, "said": 0.5}
    yield of("train", v, v["backbone"], v["batch_size"], v["benchmark"], epochs=epochs, **own)
