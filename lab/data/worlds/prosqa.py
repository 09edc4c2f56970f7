"""ProsQA-shaped questions: which of two concepts a name reaches in a random graph of nonsense words (coconut.md 6b).

The published pseudo-code does not give the published statistics. This recipe does, within sampling error for nearly all: other
thresholds, nodes that neither root reaches (`stray`) are rarely parents, never for want of others, and isolated nodes are dropped.
Generated data is no substitute for the published training file without saying so. Shortcut to report beside an accuracy: the
target is by construction at least as deep as the other option.
"""

from dataclasses import dataclass

import numpy as np

from lab.data.examples import Example
from lab.data.worlds.common import generator

NAMES = [
    "Alex", "Bob", "Carol", "Davis", "Eva", "Fae", "Gabriel", "Jack", "Max", "Oliver", "Polly", "Rex", "Sally", "Sam", "Stella",
    "Tom", "Wren",
]  # fmt: skip
CONCEPTS = [
    "boompus", "bompus", "brimpus", "chorpus", "dumpus", "felpus", "fompus", "gerpus", "gorpus", "grimpus", "gwompus", "hilpus",
    "impus", "jelpus", "jompus", "kerpus", "lempus", "lorpus", "numpus", "quimpus", "rempus", "rompus", "rorpus", "scrompus",
    "shumpus", "sterpus", "storpus", "terpus", "timpus", "tumpus", "vumpus", "worpus", "wumpus", "yerpus", "yimpus", "yumpus",
    "zhorpus", "zumpus",
]  # fmt: skip


@dataclass(frozen=True)
class ProsQA:
    """The world; the defaults meet the published statistics. `spaced` puts a space before every mark, for word tokenizers."""

    nodes: int = 28
    parents: float = 1.5
    branch: float = 0.42
    stray: float = 0.06
    spaced: bool = False

    @property
    def vocabulary(self) -> list[str]:
        """The words of `spaced` text."""
        return ["Every", "Is", "is", "a", "or", ".", "?", *NAMES, *CONCEPTS]

    def examples(self, n: int, seed: int | np.random.Generator) -> list[Example]:
        """n questions with the fields of the published files; give every split a seed of its own."""
        rng = generator(seed)
        return [self._example(i, rng) for i in range(n)]

    def _example(self, index: int, rng: np.random.Generator) -> Example:
        while (graph := self._graph(rng)) is None or (chosen := _choose(*graph, rng)) is None:
            pass
        edges, labels = graph
        root, target, other, path = chosen
        words = _words(edges, len(labels), rng)
        sentences = [self._sentence(words, edge) for edge in edges]
        order = rng.permutation(len(edges))
        first, second = (target, other) if rng.random() < 0.5 else (other, target)
        question = [sentences[i] for i in order] + [self._text(f"Is {words[root]} a {words[first]} or {words[second]}?")]
        extra = {"idx_to_symbol": words, "edges": [list(edge) for edge in edges], "root": root, "target": target, "neg_target": other}
        steps = tuple(self._sentence(words, edge) for edge in path)
        return Example(
            f"prosqa-world-{index:05d}", " ".join(question), steps, self._text(f"{words[root]} is a {words[target]}."), (), extra
        )

    def _sentence(self, words: list[str], edge: tuple[int, int]) -> str:
        subject, concept = words[edge[0]], words[edge[1]]
        return self._text(f"{subject if subject in NAMES else f'Every {subject}'} is a {concept}.")

    def _text(self, sentence: str) -> str:
        return f"{sentence[:-1]} {sentence[-1]}" if self.spaced else sentence

    def _graph(self, rng: np.random.Generator) -> tuple[list[tuple[int, int]], list[int]] | None:
        """Edges (from, to) and labels (bit 1: reachable from node 0, bit 2: from node 1), isolated nodes dropped."""
        labels, depths = [1, 2], [0, 0]
        edges: list[tuple[int, int]] = []
        for node in range(2, self.nodes):
            draw = rng.random()
            wanted = (0, 1) if draw < self.branch else (0, 2) if draw < 2 * self.branch else (0, 1, 2, 3)
            candidates = [i for i in range(node) if labels[i] in wanted]
            weights = np.array([(1.5 * depths[i] + 1) * (self.stray if labels[i] == 0 else 1.0) for i in candidates])
            count = min(int(rng.poisson(self.parents)), sum(labels[i] > 0 for i in candidates))
            found = sorted(rng.choice(candidates, size=count, replace=False, p=weights / weights.sum()).tolist()) if count else []
            edges += [(parent, node) for parent in found]
            labels.append(int(np.bitwise_or.reduce([labels[i] for i in found])) if found else 0)
            depths.append(1 + min(depths[i] for i in found) if found else 0)
        kept = sorted({node for edge in edges for node in edge})
        if kept[:2] != [0, 1]:
            return None
        place = {node: i for i, node in enumerate(kept)}
        return [(place[a], place[b]) for a, b in edges], [labels[node] for node in kept]


def _choose(edges: list[tuple[int, int]], labels: list[int], rng: np.random.Generator):
    """(root, target, other option, edges of a shortest path), or None where the graph holds no question of 3 to 6 steps."""
    inner = {a for a, _ in edges}
    reached = [_distances(edges, root) for root in (0, 1)]
    leaves = [[node for node, label in enumerate(labels) if label == root + 1 and node not in inner] for root in (0, 1)]
    if not leaves[0] or not leaves[1]:
        return None
    deepest = [max(reached[root][leaf] for leaf in leaves[root]) for root in (0, 1)]
    root = 0 if deepest[0] > deepest[1] else 1
    if not 3 <= deepest[root] <= 6:
        return None
    target = int(rng.choice([leaf for leaf in leaves[root] if reached[root][leaf] == deepest[root]]))
    return root, target, int(rng.choice(leaves[1 - root])), _path(edges, reached[root], target, rng)


def _distances(edges: list[tuple[int, int]], root: int) -> dict[int, int]:
    distances, front = {root: 0}, [root]
    while front:
        front = list(dict.fromkeys(b for a, b in edges if a in front and b not in distances))
        distances |= dict.fromkeys(front, max(distances.values()) + 1)
    return distances


def _path(edges: list[tuple[int, int]], distances: dict[int, int], target: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    path: list[tuple[int, int]] = []
    while distances[target]:
        parents = [a for a, b in edges if b == target and distances.get(a, -1) == distances[target] - 1]
        path.insert(0, (int(rng.choice(parents)), target))
        target = path[0][0]
    return path


def _words(edges: list[tuple[int, int]], count: int, rng: np.random.Generator) -> list[str]:
    """A name for every node without a parent, a concept for every other, all different."""
    children = {b for _, b in edges}
    names, concepts = iter(rng.permutation(NAMES).tolist()), iter(rng.permutation(CONCEPTS).tolist())
    return [next(concepts) if node in children else next(names) for node in range(count)]
