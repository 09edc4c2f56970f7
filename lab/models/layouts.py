"""One door for every checkpoint: `load` looks at a folder's files, asks each method's recognisers, and lets the one that knows it open it.

`lab/methods/<key>/checkpoint.py` offers `RECOGNISERS`; plain transformers checkpoints are method `none`; `lab.json` marks our own format.
"""

import logging
import pkgutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache, cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from lab.errors import CheckpointError, SettingsError, unknown
from lab.hub import local_only
from lab.models.backbones import DTYPES, check_device, load_backbone
from lab.models.latent_model import MANIFEST, LatentModel, load_own, model_class, read_manifest
from lab.models.loading import WEIGHT_FILES, read_json, tensor_shapes

log = logging.getLogger(__name__)

PLAIN = "none"
FORWARDS = ("own", "transformers")
USELESS = (
    "*.msgpack",
    "*.h5",
    "*.onnx",
    "*.ot",
    "*.gguf",
    "*.py",
    "optimizer*",
    "scheduler*",
    "rng_state*",
    "training_args.bin",
    "*.md",
    "*.png",
)


class FolderFiles:
    """What a folder (or one file in it) holds; configs and tensor shapes are read when asked for.

    Attributes:
        folder: the folder. names: paths of its files relative to it, down to three levels; one name if a single file was given.
    """

    def __init__(self, path: Path):
        self.folder = path if path.is_dir() else path.parent
        self.file = None if path.is_dir() else path
        found = (item for pattern in ("*", "*/*", "*/*/*") for item in self.folder.glob(pattern)) if path.is_dir() else [path]
        names = (item.relative_to(self.folder).as_posix() for item in found if item.is_file())
        self.names = tuple(sorted(name for name in names if not name.startswith(".")))
        self._shapes: dict[str, dict[str, tuple[int, ...]]] = {}

    def has(self, *patterns: str) -> bool:
        """Whether every pattern (with `*`) matches a file."""
        return all(any(fnmatchcase(name, pattern) for name in self.names) for pattern in patterns)

    def json(self, name: str) -> Any:
        """The parsed JSON file, or None if it is not there."""
        return read_json(self.folder / name) if name in self.names else None

    @cached_property
    def config(self) -> dict[str, Any]:
        """`config.json`, or {} if there is none."""
        value = self.json("config.json")
        return value if isinstance(value, dict) else {}

    def shapes(self, name: str = "") -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors in `name`, or in the folder's own weights; {} if there are none."""
        if not name:
            name = self.file.name if self.file else next((weights for weights in WEIGHT_FILES if weights in self.names), "")
        if name not in self.names:
            return {}
        if name not in self._shapes:
            self._shapes[name] = tensor_shapes(self.folder / name)
        return self._shapes[name]


@dataclass(frozen=True)
class Layout:
    """A recogniser's finding: the method, a name for messages, and whatever it wants to remember for loading."""

    method: str
    name: str
    found: dict[str, Any] = field(default_factory=dict)


class Recogniser(Protocol):
    """Knows one layout of one method."""

    name: str

    def recognise(self, files: FolderFiles) -> Layout | None:
        """The layout, if `files` hold it; reads configs and shapes only."""
        ...

    def load(self, folder: Path, layout: Layout, **answers: Any) -> LatentModel:
        """The model; `answers` tell what the files do not. Raises SettingsError naming an answer that is missing or not wanted."""
        ...


def load(
    path_or_hub_id: str | Path,
    *,
    method: str = "",
    device: str = "cpu",
    dtype: str = "auto",
    revision: str | None = None,
    forward: str = "own",
    **answers: Any,
) -> LatentModel:
    """The model in a folder, file or hub repository of any layout that some method recognises, in eval mode.

    Args:
        path_or_hub_id: local path, hub id, or `toy:<arch>[-<size>]`.
        method: which method's reading to take where several fit.
        dtype: of the backbone: auto (as saved), float32, bfloat16, float16.
        forward: own = lab's step over the weights; transformers = the model's own forward, slower, which rounds as the released code
            does: thoughts that amplify every rounding error then agree with it to the last bit.
        answers: what the layout itself cannot say (backbone, alpha, …); the error names what is missing.

    Raises:
        CheckpointError: nothing or several things recognised, or weights that do not fit. SettingsError: wrong `answers`.
    """
    if dtype not in (*DTYPES, "auto"):
        raise unknown("dtype", dtype, (*DTYPES, "auto"))
    if forward not in FORWARDS:
        raise unknown("forward", forward, FORWARDS)
    target = check_device(device)
    name = str(path_or_hub_id)
    model = _toy(name, **answers) if name.startswith("toy:") else _open(local_path(name, revision), method, answers)
    if dtype != "auto":
        model.backbone.to(DTYPES[dtype])
    if forward == "transformers":
        model.step_by_transformers()
    log.info("Loaded %s as method %s.", name, model.method)
    return model.to(target).eval()


def load_arms(folder: Path | str, arms: Iterable[str]) -> dict[str, LatentModel]:
    """The models that a training step saved as `folder`/<arm>, of those arms that are there; SettingsError if there is none."""
    found = {arm: load(Path(folder) / arm) for arm in arms if (Path(folder) / arm / MANIFEST).is_file()}
    if not found:
        raise SettingsError(f"{folder} holds no trained model.")
    return found


def generate(model: LatentModel | str | Path, questions: Sequence[Any], samples: int = 1, **options: Any) -> Any:
    """`samples` answers to each question by a model, or by what `load` finds under a name; see `LatentModel.generate`."""
    return (model if isinstance(model, LatentModel) else load(model)).generate(questions, samples, **options)


def identify(path_or_hub_id: str | Path, method: str = "", revision: str | None = None) -> Layout:
    """What `load` takes a checkpoint for, without loading it; raises CheckpointError as it does."""
    name = str(path_or_hub_id)
    if name.startswith("toy:"):
        return Layout(PLAIN, "a toy of random weights, made here")
    path = local_path(name, revision)
    if (path / MANIFEST).is_file():
        return Layout(read_manifest(path)["method"], f"our own format ({MANIFEST})")
    return recognise(FolderFiles(path), method)[1]


def recognise(files: FolderFiles, method: str = "") -> tuple[Recogniser, Layout]:
    """The one recogniser that knows `files` (of `method`, if given), and what it found; CheckpointError for none or several."""
    found = [(recogniser, layout) for recogniser in recognisers() if (layout := recogniser.recognise(files))]
    if not found:
        found = [(plain, layout) for plain in recognisers(PLAIN) if (layout := plain.recognise(files))]
    if method:
        found = [(recogniser, layout) for recogniser, layout in found if layout.method == method]
    if len(found) == 1:
        return found[0]
    seen = ", ".join(files.names[:8]) + (f" and {len(files.names) - 8} more" if len(files.names) > 8 else "")
    where = f"{str(files.file or files.folder)!r}"
    if found:
        names = "; ".join(f"{layout.name} (method={layout.method!r})" for _, layout in found)
        raise CheckpointError(f"{where} can be read in several ways: {names}. Say which with method=….")
    known = "; ".join(dict.fromkeys(recogniser.name for recogniser in recognisers() + recognisers(PLAIN)))
    wanted = f" as method {method!r}" if method else ""
    raise CheckpointError(f"{where} is no checkpoint that can be recognised{wanted}. It holds {seen or 'no files'}. Known: {known}.")


@cache
def recognisers(only: str = "") -> tuple[Recogniser, ...]:
    """The recognisers of every method that thinks, or of the one named `only`."""
    import lab.methods

    keys = [only] if only else [item.name for item in pkgutil.iter_modules(lab.methods.__path__) if item.ispkg and item.name != PLAIN]
    modules = [f"lab.methods.{key}.checkpoint" for key in keys]
    return tuple(recogniser for name in modules if find_spec(name) for recogniser in import_module(name).RECOGNISERS)


def local_path(name: str, revision: str | None = None) -> Path:
    """`name` if it exists here, else the local copy of that hub repository (weights once, no optimizer states, no code)."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"There is no file or folder {name!r}.")
    from huggingface_hub import HfApi, snapshot_download

    offline = local_only(name)
    try:
        if offline:
            return Path(snapshot_download(name, revision=revision, local_files_only=True))
        wanted = useful(HfApi().list_repo_files(name, revision=revision))
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except Exception as error:  # hub, network and name errors share no base
        if offline:
            reason = "it is not in the local cache, and the hub cannot be reached; download it elsewhere and give its folder"
        else:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise CheckpointError(f"There is no folder {name!r}, and nothing to fetch: {reason}.") from error


def useful(names: Iterable[str]) -> list[str]:
    """The files of a repository worth fetching: no code, no training state, no second copy of weights that are there as safetensors."""
    names = list(names)
    safe = {Path(name).parent for name in names if fnmatchcase(Path(name).name, "model*.safetensors")}
    twin = {name for name in names if Path(name).parent in safe and fnmatchcase(Path(name).name, "pytorch_model*.bin*")}
    return [name for name in names if name not in twin and not any(fnmatchcase(Path(name).name, pattern) for pattern in USELESS)]


def _open(path: Path, method: str, answers: dict[str, Any]) -> LatentModel:
    if (path / MANIFEST).is_file():
        own = read_manifest(path)["method"]
        unwanted = [name for name in answers if name not in model_class(own).answers]
        if unwanted or method not in ("", own):
            raise SettingsError(f"{str(path)!r} says everything itself (method {own!r}); leave out {', '.join(unwanted) or 'method'}.")
        return load_own(path, **answers)
    recogniser, layout = recognise(FolderFiles(path), method)
    return recogniser.load(path, layout, **answers)


def _toy(name: str, **overrides: Any) -> LatentModel:
    from lab.models.tokenizers import byte_tokenizer

    tokenizer = overrides.pop("tokenizer", None) or byte_tokenizer(chat=True)
    return LatentModel(load_backbone(name, **{"vocab_size": len(tokenizer), **overrides}), tokenizer, source=name)
