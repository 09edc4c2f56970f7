"""Files of thoughts in a prompt: the published `projection.bin` and `TransformerBlock.bin`, and our own folder (`lta.md` 5)."""

from pathlib import Path
from typing import Any

import torch

from lab.errors import CheckpointError, SettingsError, unknown
from lab.files import writing
from lab.methods.lta.config import FAMILIES, LtaSettings, family_of
from lab.methods.lta.model import LORA, ThoughtModel
from lab.models.backbones import load_backbone
from lab.models.layouts import FolderFiles, Layout
from lab.models.loading import State, load_exact, read_state
from lab.models.peft_state import merged, wrapped
from lab.models.shapes import BUFFERS
from lab.models.tokenizers import load_tokenizer

MODEL = ThoughtModel
PROJECTION, BLOCK = "projection.bin", "TransformerBlock.bin"
SETTINGS = ("num_thought_tokens", "task", "family", "eps", "gold_steps", "distinct_slots")
ANSWERS = ("backbone", "tokenizer", "assistant", "assistant_tokenizer", "pack", *SETTINGS)
TUNED = {"base": "base_model.bin", "assistant": "assistant_model.bin"}  # beside the others where the published code tuned them


class OfficialFiles:
    """A folder with `projection.bin`, and for the block mode `TransformerBlock.bin`; configs are not in it."""

    name = "LTA-Thinker or SoftCoT weights (projection.bin, TransformerBlock.bin)"
    kind: type[ThoughtModel] = ThoughtModel

    def recognise(self, files: FolderFiles) -> Layout | None:
        """The folder or file, where a block lies beside a projection; a projection alone is SoftCoT's."""
        return Layout("lta", self.name) if files.has(PROJECTION) and has_block(files) else None

    def load(self, folder: Path, layout: Layout, **answers: Any) -> ThoughtModel:
        """The model; `backbone=` (a name, folder or model) is always needed, `assistant=` where a small model makes the thoughts.

        Further: `num_thought_tokens=` (32), `task=`, `family=` (from the backbone's name), `eps=` (the family's), `tokenizer=`,
        `assistant_tokenizer=`, `pack=` (file of the prompt wording), `distinct_slots=` (whether each thought has an id of its own; as
        published: LTA's tasks except strategyqa, never SoftCoT. A projection of LTA's assistant mode needs True: its file is SoftCoT's).
        Weights of a tuned base or assistant beside them take the place of the ones given.
        """
        for name in answers:
            if name not in ANSWERS:
                raise unknown("answer", name, ANSWERS)
        folder = folder if folder.is_dir() else folder.parent
        projection = read_state(folder / PROJECTION)
        if "backbone" not in answers:
            raise SettingsError(f"{folder.name} holds only what was trained; pass backbone='…', the large model it was trained for.")
        base = answers["backbone"]
        base, name = (load_backbone(base), base) if isinstance(base, str) else (base, base.config.model_type)
        block = read_state(folder / BLOCK) if (folder / BLOCK).is_file() else None
        s = _settings(projection, block, base, answers, family_of(answers.get("family", name)))
        tokenizer = answers.get("tokenizer", name if isinstance(answers["backbone"], str) else None)
        model = self.kind.build(base, load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer, s.model_dump(mode="json"))
        assistant = answers.get("assistant")
        assistant = load_backbone(assistant) if isinstance(assistant, str) else assistant
        model.use_assistant(assistant, answers.get("assistant_tokenizer"))
        for kind, given in (("base", base), ("assistant", assistant)):
            if given is not None and (folder / TUNED[kind]).is_file():
                _fill(given, folder / TUNED[kind])
        model.opened(answers.get("pack", ""))
        load_exact(model.parts, official_names(projection, block), what=folder.name)
        return model.eval()


RECOGNISERS = [OfficialFiles()]


def has_block(files: FolderFiles) -> bool:
    """Whether the block's weights are there, also beside a projection that was given as a file."""
    return (files.folder / BLOCK).is_file()


def _fill(model, path: Path) -> None:
    """Puts the weights of a file that peft wrapped into `model`, low-rank pairs added."""
    state = merged({key.replace(".default.", "."): value for key, value in read_state(path).items()}, LORA["alpha"])
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    load_exact(model, state, what=path.name, allow_unexpected=BUFFERS)


def _settings(projection: State, block: State | None, base, answers: dict[str, Any], family: str) -> LtaSettings:
    width, inner = projection["weight"].shape
    if width != base.config.hidden_size:
        raise CheckpointError(f"{PROJECTION} writes vectors of width {width}, the backbone reads {base.config.hidden_size}.")
    if block is None and inner == width and "assistant" not in answers:
        raise CheckpointError(f"{PROJECTION} alone, of shape {width} × {inner}: the block's weights ({BLOCK}) are missing.")
    sets = projection["embedding"].shape[0] if "embedding" in projection else 1
    published = {"family": family, "eps": FAMILIES[family].eps, "distinct_slots": block is not None and answers.get("task") != "strategyqa"}
    return LtaSettings.check(
        generator="assistant" if block is None else "block",
        inner=0 if block is None else block["linear1.weight"].shape[0],
        assistant_width=inner if block is None else 0,
        **({} if block is not None else {"sft_loss_weight": 1.0, "contrastive_loss_weight": 0.0, "kl_loss_weight": 0.0}),
        num_scaling_times=sets,
        eos_id=base.config.eos_token_id if isinstance(base.config.eos_token_id, int) else -1,
        **{**published, **{key: answers[key] for key in SETTINGS if key in answers}},
    )


def official_names(projection: State, block: State | None) -> State:
    """The two published files as one state of `ThoughtParts`."""
    state = {f"generator.projection.{key}": value for key, value in projection.items() if key != "embedding"}
    state |= {f"generator.block.{key}": value for key, value in (block or {}).items()}
    return state | ({"starts": projection["embedding"]} if "embedding" in projection else {})


def load_weights(model: ThoughtModel, projection: str, block: str = "") -> None:
    """Fills a model to train from published files, `block` where it has one; CheckpointError where they do not fit it."""
    states = [read_state(Path(path).expanduser()) if path else None for path in (projection, block)]
    load_exact(model.parts, official_names(*states), what=Path(projection).name)


def export_official(model: ThoughtModel, folder: Path | str) -> Path:
    """`folder` with the published files, tuned models among them; SettingsError for a control, which has no such files."""
    folder, state = Path(folder), {key: value.detach().cpu().clone() for key, value in model.parts.state_dict().items()}
    if model.config.generator not in ("block", "assistant"):
        raise SettingsError("Only a block or a projection has this published layout; save() keeps every other kind.")
    projection = {key.removeprefix("generator.projection."): value for key, value in state.items() if ".projection." in key}
    block = {key.removeprefix("generator.block."): value for key, value in state.items() if ".block." in key}
    if "starts" in state:
        projection["embedding"] = state["starts"]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(projection, folder / PROJECTION)
        if block:
            torch.save(block, folder / BLOCK)
        for kind, whole in _tuned(model).items():
            torch.save(whole, folder / TUNED[kind])
    return folder


def _tuned(model: ThoughtModel) -> dict[str, State]:
    """The whole states of what was tuned, adapters included, as the published code writes them."""
    bodies = {"base": model.backbone, "assistant": model.assistant}
    adapters = {kind: getattr(model.parts, f"{kind}_lora", None) for kind in bodies}
    if adapters["assistant"] is not None and model.assistant is None:
        raise SettingsError(f"The assistant was tuned and is written whole; call use_assistant first ({model.config.assistant_id}).")
    found = {kind: (bodies[kind].state_dict(), lora.peft_state()) for kind, lora in adapters.items() if lora is not None}
    return {kind: {key: value.cpu().clone() for key, value in wrapped(*states).items()} for kind, states in found.items()}
