"""ProntoQA-shaped questions: five hops through an ontology of nonsense words with a dead end at every hop (coconut.md 6c).

23 rules in random order, then two premises: a chain c5 → … → c1 → c0 in which each of c1 … c5 has a property and a second,
useless parent with a property; an ontology e1 → e0 apart; and one concept whose rule contradicts the queried property of c1.
"""

from dataclasses import dataclass

import numpy as np

from lab.data.examples import Example
from lab.data.worlds.common import generator

NAMES = ["Fae", "Rex", "Sally", "Max", "Alex", "Sam", "Polly", "Stella", "Wren"]
CONCEPTS = [
    "wumpus", "yumpus", "zumpus", "dumpus", "rompus", "numpus", "tumpus", "vumpus", "impus", "jompus", "gorpus", "shumpus",
    "lempus", "sterpus", "grimpus", "lorpus", "brimpus",
]  # fmt: skip
FAMILIES = [
    family.split()
    for family in (
        "blue red brown orange", "small large", "metallic wooden luminous liquid", "transparent opaque", "nervous happy feisty shy",
        "bright dull", "sweet sour spicy bitter", "floral fruity earthy", "hot cold temperate", "kind mean angry amenable aggressive",
        "melodic muffled discordant loud", "slow moderate fast", "windy sunny overcast rainy snowy",
    )
]  # fmt: skip
HOPS = 5


@dataclass(frozen=True)
class ProntoQA:
    """The world; `spaced` puts a space before every mark, for word tokenizers."""

    spaced: bool = False

    @property
    def vocabulary(self) -> list[str]:
        """The words of `spaced` text."""
        plural = [f"{concept}es" for concept in CONCEPTS]
        capital = [word.capitalize() for word in plural]
        words = ["Every", "Each", "is", "are", "a", "an", "not", "True", "False", "or", "false", ".", ":"]
        return [*words, *NAMES, *CONCEPTS, *plural, *capital, *(word for family in FAMILIES for word in family)]

    def examples(self, n: int, seed: int | np.random.Generator) -> list[Example]:
        """n questions; steps are the proof in pairs of sentences (the last stands alone), the answer is True or False."""
        rng = generator(seed)
        return [self._example(i, rng) for i in range(n)]

    def _example(self, index: int, rng: np.random.Generator) -> Example:
        name = str(rng.choice(NAMES))
        stray, *words = rng.permutation(CONCEPTS).tolist()
        chain, dead, apart = words[: HOPS + 1], words[HOPS + 1 : 2 * HOPS + 1], words[2 * HOPS + 1 : 2 * HOPS + 3]
        families = iter(rng.permutation(len(FAMILIES)).tolist())
        has = {concept: _literal(FAMILIES[next(families)], rng) for concept in (*chain[1:], *dead, apart[1])}
        quality, denied = has[chain[1]]
        up = {chain[i]: _is_a(chain[i], chain[i - 1], rng) for i in range(1, HOPS + 1)}
        properties = {concept: _rule(concept, *literal, rng) for concept, literal in has.items()}
        rules = [*up.values(), *properties.values(), _is_a(apart[1], apart[0], rng), _rule(stray, quality, not denied, rng)]
        rules += [_is_a(chain[i], dead[i - 1], rng) for i in range(1, HOPS + 1)]
        premises = [f"{name} is {_article(concept)}." for concept in (chain[HOPS], apart[1])]
        context = [rules[i] for i in rng.permutation(len(rules))] + [premises[i] for i in rng.permutation(2)]
        truth = bool(rng.random() < 0.5)
        query = f"True or false: {_fact(name, quality, denied == truth)}"
        proof = [premises[0]]
        for i in range(HOPS, 1, -1):
            proof += [up[chain[i]], f"{name} is {_article(chain[i - 1])}."]
        proof += [properties[chain[1]], _fact(name, quality, denied)]
        steps = tuple(self._text(" ".join(proof[i : i + 2])) for i in range(0, len(proof), 2))
        return Example(f"prontoqa-world-{index:05d}", self._text(" ".join([*context, query])), steps, str(truth))

    def _text(self, text: str) -> str:
        return text.replace(".", " .").replace(":", " :") if self.spaced else text


def _literal(family: list[str], rng: np.random.Generator) -> tuple[str, bool]:
    """A property of the family and whether it is denied (one time in three)."""
    return str(rng.choice(family)), bool(rng.random() < 1 / 3)


def _article(concept: str) -> str:
    return f"{'an' if concept[0] in 'aeiou' else 'a'} {concept}"


def _is_a(concept: str, parent: str, rng: np.random.Generator) -> str:
    start = _start(rng)
    return f"{concept.capitalize()}es are {parent}es." if not start else f"{start} {concept} is {_article(parent)}."


def _rule(concept: str, quality: str, denied: bool, rng: np.random.Generator) -> str:
    start, predicate = _start(rng), ("not " if denied else "") + quality
    return f"{concept.capitalize()}es are {predicate}." if not start else f"{start} {concept} is {predicate}."


def _start(rng: np.random.Generator) -> str:
    """How a rule begins: half of them are in the plural."""
    return str(rng.choice(["", "", "Each", "Every"]))


def _fact(name: str, quality: str, denied: bool) -> str:
    return f"{name} is {'not ' if denied else ''}{quality}."
