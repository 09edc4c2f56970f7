"""The toy world of the adaptive notebooks: one or two memorised permutations in turn, written as GSM8K-Aug rows are (distill.md 9)."""

from typing import TYPE_CHECKING

from lab.data.examples import Dataset, Example
from lab.data.worlds import world
from lab.methods.adaptive.config import TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

STATES = OPERATORS = 8
NAME = "permutations"


def examples(count: int, seed: int, hops: tuple[int, int] = (1, 2)) -> Dataset:
    """Problems `op3 op1 Q 5` with steps `<<2>>`, `<<7>>` and answer `7`: a step is the state after an operator."""
    made = world(NAME, states=STATES, operators=OPERATORS).examples(count, seed, hops=hops)
    rows = tuple(_written(example, seed) for example in made)
    return Dataset(NAME, f"seed {seed}", rows, f"made here from seed {seed}")


def _written(example: Example, seed: int) -> Example:
    *operators, mark, start = example.question.split()
    question = " ".join([*operators, mark, start.removeprefix("s")])
    steps = tuple(f"<<{step.removeprefix('s')}>>" for step in example.steps)
    return Example(f"{seed}-{example.id}", question, steps, example.answer.removeprefix("s"))


def tokenizer() -> "PreTrainedTokenizerFast":
    """Whole words with the space before them, so that text comes back exactly as it was."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    numbers = [f"<<{i}>>" for i in range(STATES)] + [f" {i}" for i in range(STATES)]
    words = ["<pad>", "<eos>", *TOKENS, "Question:", " The", " answer", " is", ":", " Q", *(f" op{i}" for i in range(OPERATORS)), *numbers]
    inner = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"Question:|<<\d+>>| ?[A-Za-z]+\d*| ?\d+|:"), "isolated")
    inner.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
    made.add_tokens(list(TOKENS), special_tokens=True)
    return made
