"""Word problems with one chain of equations, in GSM8K-Aug's form: steps `<<5+7=12>>`, one a sentence, and an integer answer."""

from dataclasses import dataclass

import numpy as np

from lab.data.examples import Example
from lab.data.worlds.common import generator
from lab.errors import SettingsError

NAMES = ("Ada", "Ben", "Cleo", "Dev", "Ella", "Finn", "Gia", "Hugo", "Iris", "Jon")
THINGS = ("pears", "shells", "coins", "cards", "stamps", "beads", "books", "plums", "marbles", "pens")
START = ("{name} has {a} {things}.", "There are {a} {things} in the basket of {name}.", "{name} starts the day with {a} {things}.")
EVENTS = {
    "+": ("{name} finds {b} more.", "A friend brings {b} {things} more.", "Then {b} {things} are added."),
    "-": ("{name} gives away {b} of them.", "Later {b} {things} get lost.", "Then {b} are sold at the market."),
    "*": ("Overnight the number grows to {b} times as many.", "{name} then trades them for {b} times as many {things}."),
    "/": ("{name} shares them equally among {b} boxes and keeps one box.", "Only one part in {b} of them is left after a storm."),
}
END = ("How many {things} does {name} have now?", "How many {things} are left?", "What number of {things} does {name} have in the end?")


@dataclass(frozen=True)
class Arithmetic:
    """The world: `shortest` to `longest` steps of these `operations`, no value above `largest`; without `words` the bare chain is asked."""

    shortest: int = 1
    longest: int = 4
    operations: str = "+-*/"
    largest: int = 99
    words: bool = True

    def __post_init__(self) -> None:
        unknown = set(self.operations) - set(EVENTS)
        if unknown or not self.operations:
            raise SettingsError(f"operations = {self.operations!r}: choose from + - * /.")
        if not 1 <= self.shortest <= self.longest or self.largest < 10 or not set(self.operations) & set("+-"):
            raise SettingsError(f"{self}: 1 <= shortest <= longest, largest at least 10 and one of + and - are needed.")

    @property
    def vocabulary(self) -> list[str]:
        """The characters of all questions, steps and answers."""
        texts = [*NAMES, *THINGS, *START, *END, *(text for texts in EVENTS.values() for text in texts), "0123456789+-*/=<>? "]
        return sorted(set("".join(texts)) - set("{}_"))

    def examples(self, n: int, seed: int | np.random.Generator) -> list[Example]:
        """n problems."""
        rng = generator(seed)
        return [self._example(i, rng) for i in range(n)]

    def _example(self, index: int, rng: np.random.Generator) -> Example:
        value = start = int(rng.integers(2, self.largest + 1))
        chain: list[tuple[str, int]] = []
        steps: list[str] = []
        for _ in range(int(rng.integers(self.shortest, self.longest + 1))):
            operation, b = self._next(value, rng)
            after = {"+": value + b, "-": value - b, "*": value * b, "/": value // b}[operation]
            chain.append((operation, b))
            steps.append(f"<<{value}{operation}{b}={after}>>")
            value = after
        ask = self._story if self.words else self._bare
        return Example(f"arithmetic-{index:05d}", ask(start, chain, rng), tuple(steps), str(value))

    def _next(self, value: int, rng: np.random.Generator) -> tuple[str, int]:
        """An operation and its number, among those that keep every value a whole number from 0 to `largest`."""
        choices = {
            "+": range(1, self.largest - value + 1),
            "-": range(1, value + 1),
            "*": range(2, self.largest // max(1, value) + 1) if value else (),
            "/": [b for b in range(2, min(value, 12) + 1) if value % b == 0],
        }
        operation = str(rng.choice([name for name in self.operations if choices[name]]))
        return operation, int(rng.choice(choices[operation]))

    def _story(self, start: int, chain: list[tuple[str, int]], rng: np.random.Generator) -> str:
        who = {"name": rng.choice(NAMES), "things": rng.choice(THINGS)}
        events = [str(rng.choice(EVENTS[operation])).format(b=b, **who) for operation, b in chain]
        return " ".join([str(rng.choice(START)).format(a=start, **who), *events, str(rng.choice(END)).format(**who)])

    def _bare(self, start: int, chain: list[tuple[str, int]], rng: np.random.Generator) -> str:
        return f"{start}{''.join(f' {operation} {b}' for operation, b in chain)} ?"
