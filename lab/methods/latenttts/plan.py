"""What a recipe trains, from its parameters alone."""

from collections.abc import Iterator
from typing import Any

from lab.estimate import Training, of
from lab.methods.latenttts.config import RewardSettings
from lab.methods.latenttts.toy import SHAPE


def trainings(settings: dict[str, dict[str, Any]]) -> Iterator[Training]:
    """The reward model: a copy of the generator reads prompts and the thoughts of all samples."""
    if "train_rm" not in settings or "annotate" not in settings:
        return
    v, asked = settings["train_rm"], settings["annotate"]
    toy = v["model"] == "toy"
    rows = {"global_batch": v["global_batch"] * asked["n_samples"], "micro_batch": v["micro_batch"] * asked["n_samples"]}
    samples = {"examples": asked["train_questions"] * asked["n_samples"], "method": "latenttts"}
    own = {"shape": SHAPE, "settings": RewardSettings().model_dump()} if toy else {"settings": RewardSettings().model_dump()}
    name = "toy:gpt2" if toy else v["model"]
    how = {"steps": v["steps"], "epochs": v["epochs"], **samples, **own}
    yield of("train_rm", {**v, **rows}, name, rows["global_batch"], asked["benchmark"], **how)
