"""The steps of the pipeline as one call each, on folders of earlier steps; a notebook calls them and shows what they return."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lab.errors import DataError
from lab.launch import on_main
from lab.methods.tah.config import TahConfig
from lab.methods.tah.data import Row
from lab.methods.tah.labels import Labelling, label_report, label_rows
from lab.methods.tah.model import TahModel, standard
from lab.methods.tah.prepare import BACKBONE, Labelled, Preparation, Source, prepare
from lab.methods.tah.score import score_tokens, token_decider
from lab.methods.tah.toy import arithmetic
from lab.methods.tah.training import build_arm, train_model, train_step2, with_mlp
from lab.models.latent_model import LatentModel
from lab.models.layouts import load
from lab.train import TrainSettings


def label(folder: Path, how: Preparation, labelling: Labelling) -> dict[str, dict[str, Any]]:
    """Labels every split into `folder`/<split> and keeps what later steps need; {split: report of its labels}."""
    source: Source = prepare(folder, how, labelling)
    source.save(folder)
    for name, rows in source.rows.items():
        label_rows(source.reference, rows, folder / name, labelling)
    return {name: label_report(Labelled(folder).rows(name)) for name in source.rows}


def pruning_input(what: str, labelled: Path, folder: Path, steps: int, seed: int) -> tuple[LatentModel, list[str]]:
    """The model to prune and texts to measure it on: `toy:arithmetic` is trained here, `backbone` is the label step's, else a name."""
    if what == "toy:arithmetic":
        return arithmetic(steps, seed, folder / "training")
    source = Labelled(labelled)
    model = source.model() if what == "backbone" else load(what)
    if model.tokenizer is None:
        raise DataError(f"{what!r} has no tokenizer, so there is no text to measure its layers on.")
    texts = [model.tokenizer.decode(row["real_token"]) for row in source.rows("validation")[:64]]
    return model, texts


def run_arm(
    arm: str,
    label: str,
    folder: str,
    training: dict[str, Any],
    tah: dict[str, Any],
    examples: dict[str, Any],
    backbone: str = "",
    scored: int = 0,
) -> dict[str, Any]:
    """One arm of step 1 from a label step's folder to `folder`/<arm>; plain arguments, so that several processes can share it.

    Args:
        training: of `TrainSettings`. tah: of `TahConfig`. examples: of `ExampleSettings`. backbone: instead of the label step's.
        scored: validation examples to score at every evaluation, 0 = none.
    """
    source, settings, config = Labelled(label), TrainSettings.check(**training), TahConfig.check(**tah)
    torch.manual_seed(settings.seed)
    base = load(backbone, dtype="float32") if backbone else source.model()
    model = build_arm(arm, base.backbone, config, base.tokenizer)
    rows = source.examples("train", config.max_iter, **examples)
    held_out = source.examples("validation", config.max_iter, **examples)[:scored] if scored else ()
    result = train_model(model, rows, settings, Path(folder) / f"training-{arm}", validation=held_out, label=arm)
    on_main(lambda: str(model.save(Path(folder) / arm, overwrite=True)))
    share = sum(count > 1 for row in rows for count in row["iter_count_labels"]) / sum(len(row["labels"]) for row in rows)
    return {"steps": result.steps, "loss": result.loss, "seconds": result.seconds, "examples": len(rows), "hard_share": share}


def run_step2(
    label: str,
    model: str,
    folder: str,
    training: dict[str, Any],
    decider: dict[str, Any],
    examples: dict[str, Any],
    cached: bool,
    max_tokens: int,
) -> dict[str, Any]:
    """Step 2 from the checkpoint `model` to `folder`/tah; `decider` holds the settings of the MLP, pos_weight and loss_scaling."""
    source, settings = Labelled(label), TrainSettings.check(**training)
    torch.manual_seed(settings.seed)
    deep = with_mlp(load(model, dtype="float32"), **decider)
    rows = source.examples("train", deep.tah.max_iter, **examples)
    result, features = train_step2(deep, rows, settings, Path(folder) / "training-decider", max_tokens=max_tokens, cached=cached)
    on_main(lambda: str(deep.save(Path(folder) / "tah", overwrite=True)))
    return {"steps": result.steps, "loss": result.loss, "seconds": result.seconds, "tokens": len(features) if features else 0}


def arms_of(source: Labelled, train1: Path, train2: Path | None, checkpoint: str = "", threshold: float = 0.0) -> dict[str, TahModel]:
    """The models there are, by arm: the base (of toys), the controls of step 1, and `tah` with its decider where step 2 took part.

    Args:
        checkpoint: a model for `tah` instead of this run's. threshold: its decider's, 0 = as saved.
    """
    found = {}
    if source.facts["backbone"] == BACKBONE:
        found["base"] = standard(source.model().backbone)
        found["base"].tokenizer = source.model().tokenizer
    for arm in ("sft", "always"):
        if (train1 / arm).is_dir():
            found[arm] = load(train1 / arm)
    if checkpoint or train2 is not None:
        found["tah"] = load(checkpoint or train2 / "tah")
    if threshold:
        found["tah"].set_threshold(threshold)
    return found


def token_table(
    models: dict[str, TahModel], examples: Sequence[Row], hard: Sequence[Sequence[int]] | None = None
) -> dict[str, dict[str, float]]:
    """{arm: numbers per token}: one-pass models as they are, `always` twice, `tah` under never, always, oracle labels and its decider."""
    table = {}
    for arm, model in models.items():
        if arm == "tah":
            policies = ["never", "always", "oracle", *(["decider"] if model.tah.iter_decider == "MLPIterDecider" else [])]
        else:
            policies = ["always" if arm == "always" else "never"]
        for policy in policies:
            name = f"{arm} {policy}" if arm == "tah" else arm
            table[name] = score_tokens(model, examples, token_decider(model, policy), hard).summary()
    return table
