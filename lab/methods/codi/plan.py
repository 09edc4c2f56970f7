"""What a recipe trains, from its parameters alone."""

from collections.abc import Iterator
from typing import Any

from lab.estimate import Training, of
from lab.methods.codi.config import CodiSettings


def trainings(settings: dict[str, dict[str, Any]]) -> Iterator[Training]:
    """Every arm: teacher and student read a row, the question once for both."""
    v = settings["train"]
    shape = {"layers": v["layers"]} if v["backbone"].startswith("toy:") else {}
    own = CodiSettings.check(**{name: v[name] for name in CodiSettings.model_fields if name in v})
    how = {"method": "codi", "settings": own.model_dump(), "thoughts": own.num_latent, "passes": 1.5, "said": 0.5, "lora": (own.lora_r, ())}
    how |= {"examples": v["train_problems"], "shape": shape}
    arms = len(v["arms"])
    yield of("train", v, v["backbone"], v["batch_size"], v["benchmark"], steps=arms * v["steps"], epochs=arms * v["epochs"], **how)
