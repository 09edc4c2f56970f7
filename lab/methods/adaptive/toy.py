"""The toy worlds of the adaptive notebooks, written as GSM8K-Aug rows are: memorised permutations in turn, running sums (distill.md 9)."""

from typing import TYPE_CHECKING

from lab.data.examples import Dataset, Example
from lab.data.worlds import world
from lab.errors import unknown
from lab.methods.adaptive.config import TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

PERMUTATIONS, SUMS = "permutations", "sums"
STATES = OPERATORS = 8


def examples(count: int, seed: int, world_name: str = PERMUTATIONS) -> Dataset:
    """Problems of a world, written as GSM8K-Aug is.

    permutations: `op3 op1 Q 5`, steps `<<2>>`, `<<7>>`, answer `7`; a step is the state after an operator, one or two a problem.
    sums: `3 1 4 2`, steps `<<4>>`, `<<3>>`, answer `0`; a step is a partial sum modulo 5, the last one is the answer.
    """
    if world_name == PERMUTATIONS:
        made = world(PERMUTATIONS, states=STATES, operators=OPERATORS).examples(count, seed, hops=(1, 2))
        rows = tuple(_permuted(example, seed) for example in made)
    elif world_name == SUMS:
        made = world(SUMS, terms=3, modulus=5).examples(count, seed)
        rows = tuple(Example(f"{seed}-{e.id}", f"Q {e.question}", tuple(f"<<{step}>>" for step in e.steps), e.answer) for e in made)
    else:
        raise unknown("toy world", world_name, (PERMUTATIONS, SUMS))
    return Dataset(world_name, f"seed {seed}", rows, f"made here from seed {seed}")


def _permuted(example: Example, seed: int) -> Example:
    *operators, mark, start = example.question.split()
    question = " ".join([*operators, mark, start.removeprefix("s")])
    steps = tuple(f"<<{step.removeprefix('s')}>>" for step in example.steps)
    return Example(f"{seed}-{example.id}", question, steps, example.answer.removeprefix("s"))


def backbone(name: str, vocab_size: int, seed: int) -> "PreTrainedModel":
    """A toy whose embeddings are as large as the thoughts that a filter with its layer norm makes: it learns several times faster."""
    import torch

    from lab.models.backbones import load_backbone

    size = {"kv_heads": 4} if "gpt2" not in name else {}
    made = load_backbone(
        name, vocab_size=vocab_size, seed=seed, tied=False, initializer_range=0.08, max_positions=64, intermediate=256, **size
    )
    with torch.no_grad():
        made.get_input_embeddings().weight.normal_(generator=torch.Generator().manual_seed(seed))
    return made


def tokenizer() -> "PreTrainedTokenizerFast":
    """Whole words with the space before them, so that text comes back exactly as it was."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    numbers = [f"{before}{i}{behind}" for before, behind in (("<<", ">>"), (" ", ""), ("", "")) for i in range(STATES)]
    operators = [f"{before}op{i}" for before in (" ", "") for i in range(OPERATORS)]
    words = ["<pad>", "<eos>", *TOKENS, "Question:", " The", " answer", " is", ":", " Q", "Q", *operators, *numbers]
    inner = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"Question:|<<\d+>>| ?[A-Za-z]+\d*| ?\d+|:"), "isolated")
    inner.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
    made.add_tokens(list(TOKENS), special_tokens=True)
    return made
