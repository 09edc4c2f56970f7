"""The toy world of CoLaR: memorised permutations applied in turn, reasoning written as `op s op s op s` (`colar.md` 9)."""

from typing import TYPE_CHECKING

from lab.data.examples import Dataset, Example
from lab.data.worlds.permutations import Permutations
from lab.methods.colar.config import SEPARATOR, ColarSettings
from lab.methods.colar.model import ColarModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WORLD = Permutations(states=8, operators=8, hops=3)
SEEDS = {"train": 1_000_000, "validation": 2_000_000, "test": 3_000_000}
SHAPE = {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 4, "max_positions": 64}


def examples(split: str, count: int, seed: int) -> Dataset:
    """`count` problems of a split; states are written as digits: `op3 op1 op0 Q 5`, steps `op3 2`, …, answer `7`."""
    rows = tuple(_plain(example) for example in WORLD.examples(count, SEEDS[split] + seed, with_operators=True))
    return Dataset("permutations", split, rows, f"made here from seed {seed}")


def _plain(example: Example) -> Example:
    question = " ".join(word.removeprefix("s") for word in example.question.split())
    steps = tuple(" ".join(word.removeprefix("s") for word in step.split()) for step in example.steps)
    return Example(example.id, question, steps, example.answer.removeprefix("s"))


def tokenizer(largest: int) -> "PreTrainedTokenizerFast":
    """One token for each phrase of the published layout, each operator and each state; white space is not kept."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    speeds = [f"(Thinking speed: {factor})" for factor in (*range(1, largest + 1), "auto")]
    phrases = ["Question:", "Let's think step by step:", *speeds, SEPARATOR, "Answer:", "Q"]
    words = ["<pad>", "<eos>", *phrases, *(f"op{i}" for i in range(WORLD.operators)), *map(str, range(WORLD.states))]
    inner = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}))
    pieces = r"Question:|Let's think step by step:|\(Thinking speed: \w+\)|###|Answer:|op\d+|\w"
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(pieces), "removed", invert=True)
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


def untrained(backbone: str, seed: int, settings: ColarSettings) -> ColarModel:
    """A small model in this world's vocabulary; `backbone` is a toy preset."""
    import torch

    from lab.models.backbones import load_backbone

    words = tokenizer(settings.max_compression_factor)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ColarModel.start(load_backbone(backbone, vocab_size=len(words), seed=seed, **SHAPE), words, settings)
