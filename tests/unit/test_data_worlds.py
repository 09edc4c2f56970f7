"""The worlds: every problem follows from its own rules, and the graph worlds have the published statistics."""

import re
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from lab.data.worlds import WORLDS, prontoqa, prosqa, world
from lab.errors import SettingsError


@pytest.mark.parametrize("name", sorted(WORLDS))
def test_seeds_and_vocabulary(name):
    made = world(name)
    assert made.examples(20, 5) == made.examples(20, 5) != made.examples(20, 6)
    assert len(set(made.vocabulary)) == len(made.vocabulary)
    assert len({example.id for example in made.examples(20, 5)}) == 20
    with pytest.raises(SettingsError, match="setting of the world"):
        world(name, nonsense=1)


@pytest.mark.parametrize(("name", "settings"), [("prosqa", {"spaced": True}), ("prontoqa", {"spaced": True}), ("permutations", {})])
def test_text_is_made_of_the_vocabulary(name, settings):
    made = world(name, **settings)
    known = set(made.vocabulary)
    for example in made.examples(100, 1):
        assert set(" ".join([example.question, *example.steps, example.answer]).split()) <= known


def test_permutations():
    made = world("permutations", hops=4)
    assert (np.sort(made.table, axis=1) == np.arange(8)).all() and (made.table == world("permutations").table).all()
    batch = made.batch(500, 0)
    assert batch.prompt.shape == (500, 6) and (batch.prompt[:, 4] == 0).all() and (batch.answer == batch.steps[:, -1]).all()
    for prompt, steps in zip(batch.prompt, batch.steps, strict=True):
        state = prompt[-1] - 11
        for operator, after in zip(prompt[:4] - 3, steps, strict=True):
            state = made.table[operator, state]
            assert after == 11 + state
    assert made.batch(3, 0, hops=1).steps.shape == (3, 1)


def test_permutations_as_text():
    made = world("permutations")
    mixed = made.examples(300, 2, hops=(1, 3))
    assert {len(example.steps) for example in mixed} == {1, 2, 3}
    assert all(example.question.split().index("Q") == len(example.steps) and example.steps[-1] == example.answer for example in mixed)
    paired = made.examples(5, 2, with_operators=True)
    assert [step.split()[0] for step in paired[0].steps] == paired[0].question.split()[:3]
    slow = made.examples(400, 3, slow=0.5)
    assert 0.4 < np.mean([example.extra["slow"] for example in slow]) < 0.6
    assert all(len(example.steps) == (6 if example.extra["slow"] else 3) for example in slow)
    assert all(example.steps[::2] == example.steps[1::2] for example in slow if example.extra["slow"])


def test_sums():
    batch = world("sums", terms=4, modulus=7).batch(200, 0)
    assert batch.prompt.shape == (200, 5) and batch.steps.shape == (200, 3)
    for prompt, steps, answer in zip(*batch, strict=True):
        assert [sum(prompt[: i + 2]) % 7 for i in range(4)] == [*steps, answer]


def test_maxmin():
    for example in world("maxmin").examples(200, 0):
        tokens = example.question.split()
        value, steps = int(tokens[0]), []
        for operator, digit in zip(tokens[1::2], tokens[2::2], strict=True):
            value = (max if operator == "max" else min)(value, int(digit))
            steps.append(str(value))
        assert tuple(steps) == example.steps and example.answer == steps[-1]


def test_instruct_base_corpus_does_what_the_instruction_says():
    made = world("instruct")
    for slots in (1, 4):
        ids, targets = made.batch(300, 1, slots)
        assert ids.shape == targets.shape == (300, slots + 13)
        doing = {"sort": sorted, "reverse": lambda x: x[::-1], "copy": list, "raise": lambda x: [(d + 1) % 10 for d in x]}
        for row, wanted in zip(ids, targets, strict=True):
            words = [made.vocabulary[i] for i in row]
            said = [word for word in words[1 : 1 + slots] if word in doing]
            x, y = ([int(word) for word in words[i : i + 5]] for i in (1 + slots, 7 + slots))
            assert len(said) == 1 and y == list(doing[said[0]](x)) and words[-1] == "EOS"
            assert wanted[wanted != -100].tolist() == row[7 + slots : 12 + slots].tolist()
            assert (np.flatnonzero(wanted != -100) == np.arange(6 + slots, 11 + slots)).all()


def test_instruct_task_depends_on_a_seven():
    examples = world("instruct").examples(2000, 0)
    for example in examples:
        x = example.question.split()
        assert example.answer.split() == (sorted(x) if "7" in x else x[::-1])
        assert example.steps == (("seven", "sort") if "7" in x else ("none", "reverse"))
    assert 0.37 < np.mean(["7" in example.question for example in examples]) < 0.45


@pytest.mark.parametrize("settings", [{}, {"words": False, "longest": 6}, {"operations": "+-", "largest": 20, "shortest": 2, "longest": 2}])
def test_arithmetic(settings):
    made = world("arithmetic", **settings)
    letters = set(made.vocabulary)
    for example in made.examples(300, 0):
        value = None
        for step in example.steps:
            a, operation, b, after = re.fullmatch(r"<<(\d+)([-+*/])(\d+)=(\d+)>>", step).groups()
            assert value is None or a == value
            result = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b), "/": Fraction(int(a), int(b))}[operation]
            assert result == int(after) and 0 <= result <= made.largest and b in re.findall(r"\d+", example.question)
            value = after
        assert example.answer == value and made.shortest <= len(example.steps) <= made.longest
        assert set("".join([example.question, *example.steps, example.answer])) <= letters
    assert len({example.question for example in made.examples(300, 0)}) > 250


def test_arithmetic_settings():
    for settings in ({"operations": "^"}, {"operations": ""}, {"operations": "*"}, {"shortest": 3, "longest": 2}, {"largest": 5}):
        with pytest.raises(SettingsError):
            world("arithmetic", **settings)


def share(values):
    return {key: count / len(values) for key, count in Counter(values).items()}


@pytest.fixture(scope="module")
def graphs():
    return world("prosqa").examples(600, 1)


def reach(edges, root):
    distances, front = {root: 0}, [root]
    for node in front:
        for a, b in edges:
            if a == node and b not in distances:
                distances[b] = distances[a] + 1
                front.append(b)
    return distances


def test_prosqa_questions_are_sound(graphs):
    for example in graphs:
        graph = example.extra
        words, edges = graph["idx_to_symbol"], graph["edges"]
        here, there = reach(edges, graph["root"]), reach(edges, 1 - graph["root"])
        inner = {a for a, _ in edges}
        target, other = graph["target"], graph["neg_target"]
        assert target not in inner and other not in inner and target not in there and other not in here
        exclusive = [node for node in here if node not in inner and node not in there]
        assert here[target] == max(here[node] for node in exclusive) == len(example.steps) >= there[other]
        assert len(set(words)) == len(words) and all(a < b for a, b in edges) and len(set(map(tuple, edges))) == len(edges)
        assert example.answer == f"{words[graph['root']]} is a {words[target]}."
        sentences = example.question.split(". ")
        assert len(sentences) == len(edges) + 1 and set(step.rstrip(".") for step in example.steps) <= set(sentences)
        assert {words[target], words[other]} == set(re.fullmatch(r"Is \w+ a (\w+) or (\w+)\?", sentences[-1]).groups())
        subject = words[graph["root"]]
        for step in example.steps:
            found = re.fullmatch(r"(?:Every )?(\w+) is a (\w+)\.", step)
            assert found[1] == subject
            subject = found[2]
        assert subject == words[target]


def test_prosqa_has_the_published_statistics(graphs):
    nodes = np.array([len(example.extra["idx_to_symbol"]) for example in graphs])
    edges = np.array([len(example.extra["edges"]) for example in graphs])
    assert abs(nodes.mean() - 22.81) < 0.4 and abs(nodes.std() - 1.99) < 0.3
    assert abs(edges.mean() - 36.0) < 1.0 and abs(edges.std() - 5.75) < 0.7
    assert abs(np.mean([len(example.question.split()) for example in graphs]) - 179) < 6
    steps = share([len(example.steps) for example in graphs])
    for length, wanted in {3: 0.408, 4: 0.438, 5: 0.131, 6: 0.024}.items():
        assert abs(steps.get(length, 0) - wanted) < 0.06, steps
    assert steps.keys() <= {3, 4, 5, 6}
    assert abs(np.mean([example.extra["root"] for example in graphs]) - 0.636) < 0.06
    parents = [Counter(b for _, b in example.extra["edges"]) for example in graphs]
    degree = share([min(5, found[node]) for found, count in zip(parents, nodes, strict=True) for node in range(2, count)])
    for k, wanted in enumerate((0.027, 0.479, 0.305, 0.133, 0.042, 0.011)):
        assert abs(degree[k] - wanted) < 0.02, degree
    entities = share([sum(found[node] == 0 for node in range(count)) for found, count in zip(parents, nodes, strict=True)])
    for k, wanted in {2: 0.58, 3: 0.32, 4: 0.09}.items():
        assert abs(entities[k] - wanted) < 0.08, entities
    labels = [_label(example.extra, node) for example in graphs for node in range(len(example.extra["idx_to_symbol"]))]
    for kind, wanted in {"root": 0.535, "other": 0.372, "both": 0.06, "none": 0.034}.items():
        assert abs(share(labels)[kind] - wanted) < 0.05, share(labels)
    first = [example.question.rsplit(" or ", 1)[0].endswith(example.answer.split()[-1].rstrip(".")) for example in graphs]
    assert abs(np.mean(first) - 0.5) < 0.07


def _label(graph, node):
    if "reached" not in graph:
        graph["reached"] = [reach(graph["edges"], root) for root in (graph["root"], 1 - graph["root"])]
    return {(True, False): "root", (False, True): "other", (True, True): "both", (False, False): "none"}[
        tuple(node in reached for reached in graph["reached"])
    ]


def test_prosqa_words_are_drawn_evenly(graphs):
    used = Counter(word for example in graphs for word in example.extra["idx_to_symbol"])
    assert set(used) == set(prosqa.NAMES) | set(prosqa.CONCEPTS) and len(prosqa.NAMES) == 17 and len(prosqa.CONCEPTS) == 38
    counts = [used[concept] for concept in prosqa.CONCEPTS]
    assert max(counts) < 1.3 * min(counts)


RULE = re.compile(r"(?:(?P<start>Every|Each) )?(?P<subject>\w+) (?:is|are) (?P<rest>.+)")
PROPERTIES = {word for family in prontoqa.FAMILIES for word in family}


def ontology(example):
    """Is-a rules, property rules, premises and query of a question, as sets of pairs."""
    context, query = example.question.split(" True or false: ")
    parents, has, facts = [], [], []
    for sentence in context.rstrip(".").split(". "):
        found = RULE.fullmatch(sentence)
        subject, rest = found["subject"], found["rest"]
        if subject in prontoqa.NAMES:
            facts.append((subject, rest.split()[-1]))
            continue
        subject = subject.lower() if found["start"] else subject.lower().removesuffix("es")
        word = rest.split()[-1]
        if word in PROPERTIES:
            has.append((subject, word, rest.startswith("not ")))
        else:
            parents.append((subject, word if found["start"] else word.removesuffix("es")))
    return parents, has, facts, query


@pytest.fixture(scope="module")
def proofs():
    return world("prontoqa").examples(400, 1)


def test_prontoqa_is_built_as_published(proofs):
    for example in proofs:
        parents, has, facts, query = ontology(example)
        assert (len(parents), len(has), len(facts)) == (11, 12, 2)
        concepts = {word for pair in parents for word in pair} | {subject for subject, _, _ in has}
        degree = Counter(child for child, _ in parents)
        assert len(concepts) == 14 and Counter(degree[c] for c in concepts) == {0: 8, 1: 1, 2: 5}
        assert Counter(Counter(subject for subject, _, _ in has)[c] for c in concepts) == {1: 12, 0: 2}
        context = example.question.split(" True or false: ")[0]
        assert context.count(".") == 25 and 85 <= len(context.split()) <= 112
        families = [next(i for i, family in enumerate(prontoqa.FAMILIES) if word in family) for _, word, _ in has]
        assert sorted(Counter(families).values()) == [1] * 10 + [2]
        name, asked = facts[0][0], re.fullmatch(r"(\w+) is (not )?(\w+)\.", query)
        assert asked[1] == name
        known = {start for _, start in facts}
        for _ in range(6):
            known |= {up for child, up in parents if child in known}
        held = [denied for subject, word, denied in has if word == asked[3] and subject in known]
        against = [denied for subject, word, denied in has if word == asked[3] and subject not in known]
        assert len(held) == 1 and against == [not held[0]]
        assert example.answer == str(held[0] == bool(asked[2]))


def test_prontoqa_proofs(proofs):
    for example in proofs:
        sentences = " ".join(example.steps).rstrip(".").split(". ")
        assert len(sentences) == 11 and len(example.steps) == 6
        given = set(example.question.split(" True or false: ")[0].rstrip(".").split(". "))
        assert set(sentences[1::2]) <= given and sentences[0] in given
        assert not set(sentences[2::2]) & given


def test_prontoqa_shares(proofs):
    assert abs(np.mean([example.answer == "True" for example in proofs]) - 0.5) < 0.08
    rules = [sentence for example in proofs for sentence in example.question.split(". ")[:23]]
    starts = share([sentence.split()[0] if sentence.split()[0] in ("Each", "Every") else "" for sentence in rules])
    assert abs(starts[""] - 0.49) < 0.03 and abs(starts["Each"] - 0.25) < 0.02 and abs(starts["Every"] - 0.25) < 0.02
    assert abs(np.mean([" not " in sentence for sentence in rules]) - 4 / 23) < 0.03
    assert abs(np.mean([" is not " in example.question.rsplit(":", 1)[1] for example in proofs]) - 0.5) < 0.08
    assert {example.answer for example in proofs} == {"True", "False"}
