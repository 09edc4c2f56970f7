"""Released reward models (`dd101bb/latentRM`): transformer, classifier, and a CODI generator's projector (`latenttts.md` 5)."""

from pathlib import Path
from typing import Any

from lab.errors import CheckpointError
from lab.files import writing
from lab.methods.latenttts.config import RewardSettings
from lab.methods.latenttts.model import RewardModel
from lab.models.answers import check_answers, tokenizer_from
from lab.models.backbones import load_config
from lab.models.layouts import FolderFiles, Layout
from lab.models.loading import State, load_exact, part, read_state
from lab.models.shapes import filled

MODEL = RewardModel
HEAD, PROJECTOR = "classifier.", "projector."
NAMES = {"1": "1", "3": "3", "4": "ln"}  # of the projector's layers, theirs and ours


class LatentRMRelease:
    """A transformers folder with a one-number head."""

    name = "LatentRM release (classifier.weight beside transformer.*)"

    def recognise(self, files: FolderFiles) -> Layout | None:
        """The folder, where a head of one row stands beside a transformer."""
        shapes = files.shapes()
        body = any(key.startswith(("transformer.", "model.")) for key in shapes)
        return Layout("latenttts", self.name) if body and shapes.get(f"{HEAD}weight", (0,))[0] == 1 else None

    def load(self, folder: Path, layout: Layout, **answers: Any) -> RewardModel:
        """The model; `tokenizer=`, `generator=` (guessed from the projector otherwise) and `loss=` (`ce`) may be given."""
        check_answers(answers, ("tokenizer", "generator", "loss"))
        config, tokenizer, state = load_config(str(folder)), tokenizer_from(answers, folder), read_state(folder)
        body = {key: value for key, value in state.items() if not key.startswith((HEAD, PROJECTOR))}
        inner = state[f"{PROJECTOR}1.weight"].shape[0] if f"{PROJECTOR}1.weight" in state else 0
        s = RewardSettings.check(
            generator=answers.get("generator", "codi" if inner else "coconut"), loss=answers.get("loss", "ce"), projector_width=inner
        )
        backbone = filled(config, with_head(body, config), folder.name)
        model = RewardModel.build(backbone, tokenizer, s.model_dump(mode="json"), source=str(folder))
        load_exact(model.parts.classifier, part(state, HEAD), what=f"{folder.name} (classifier)")
        if inner:
            load_exact(model.parts.projector, _renamed(part(state, PROJECTOR), NAMES), what=f"{folder.name} (projector)")
        return model.eval()


RECOGNISERS = [LatentRMRelease()]


def with_head(body: State, config: Any) -> State:
    """The transformer's weights with its tied vocabulary head, which a reward model's file lacks and a scorer never uses."""
    if "lm_head.weight" in body:
        return body
    for name in ("transformer.wte.weight", "model.embed_tokens.weight"):
        if name in body:
            config.tie_word_embeddings = True
            return {**body, "lm_head.weight": body[name]}
    raise CheckpointError("The file holds no embedding table of a GPT-2, Llama or Qwen model.")


def _renamed(state: State, names: dict[str, str]) -> State:
    return {f"{names[layer]}.{leaf}": value for (layer, leaf), value in ((key.split("."), value) for key, value in state.items())}


def export_release(model: RewardModel, folder: Path | str) -> Path:
    """`folder`, written as the released reward models are: config, `transformer.*`, `classifier.*`, and `projector.*` for CODI."""
    from safetensors.torch import save_file

    folder = Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        body = {key: value for key, value in model.backbone.state_dict().items() if not key.startswith("lm_head")}
        body |= {f"{HEAD}{key}": value for key, value in model.parts.classifier.state_dict().items()}
        if model.parts.projector is not None:
            back = {ours: theirs for theirs, ours in NAMES.items()}
            body |= {f"{PROJECTOR}{key}": value for key, value in _renamed(model.parts.projector.state_dict(), back).items()}
        save_file(
            {key: value.detach().cpu().clone().contiguous() for key, value in body.items()},
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
        model.backbone.config.save_pretrained(folder)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(folder)
    return folder
