"""The pointer world says what it promises: cycles, look-ups, hardness, corpora."""

import numpy as np
import pytest

from lab.data.worlds import world
from lab.errors import SettingsError


def decode(world_, row):
    words = [world_.vocabulary[token] for token in row]
    pairs = {word[0]: (word[1], word[2]) for word in words[1 : 1 + world_.nodes]}
    return pairs, list(zip(words[1 + world_.nodes :: 2], words[2 + world_.nodes :: 2], strict=True))


def test_published_sizes():
    spelled = world("pointers")
    assert len(spelled.vocabulary) == len(set(spelled.vocabulary)) == 83 and spelled.length == 17
    arrows = world("pointers", task="arrows")
    assert len(arrows.vocabulary) == len(set(arrows.vocabulary)) == 147 and arrows.length == 17


@pytest.mark.parametrize("corpus", ["base", "tuned"])
@pytest.mark.parametrize("task", ["spelled", "arrows"])
def test_every_answer_follows_from_its_context(task, corpus):
    made = world("pointers", task=task)
    batch = made.batch(200, 3, corpus)
    for row, hard in zip(batch.ids, batch.hard[:, 9::2], strict=True):
        pairs, asked = decode(made, row)
        assert len(pairs) == 8
        node, seen = "a", set()
        while node not in seen:
            seen.add(node)
            node = pairs[node][1]
        assert len(seen) == 8 and node == "a", "one cycle through all nodes"
        for (question, answer), is_hard in zip(asked, hard, strict=True):
            arrow, target = pairs[question.lower()]
            twice = corpus == "tuned" and (question.isupper() if task == "spelled" else arrow == "⇒")
            assert is_hard == twice
            if task == "arrows" and question.isupper():
                assert corpus == "base" and answer == arrow
            else:
                assert answer == (pairs[target][1] if twice else target)
                assert not twice or answer not in (question.lower(), target)


def test_targets_stand_at_questions_only():
    batch = world("pointers", task="arrows").batch(50, 0)
    columns = np.flatnonzero((batch.targets != -100).any(axis=0))
    assert columns.tolist() == [9, 11, 13, 15] and (batch.targets != -100).sum() == 200
    assert (batch.targets[:, columns] == batch.ids[:, columns + 1]).all()
    assert not batch.hard[:, [c for c in range(17) if c not in columns]].any()


@pytest.mark.parametrize("task", ["spelled", "arrows"])
def test_shares_and_seeds(task):
    made = world("pointers", task=task)
    tuned = made.batch(4000, 1)
    assert abs(tuned.hard[:, 9::2].mean() - 0.3) < 0.02
    base = made.batch(4000, 1, "base")
    assert not base.hard.any()
    capital = np.isin(base.ids[:, 9::2], range(11, 19)).mean()
    assert abs(capital - {"spelled": 0.5, "arrows": 0.2}[task]) < 0.02
    assert (made.batch(4000, 1).ids == tuned.ids).all()
    assert (made.batch(4000, 2).ids != tuned.ids).any()


def test_in_arrows_the_question_says_nothing_about_hardness():
    batch = world("pointers", task="arrows").batch(8000, 5)
    asked, hard = batch.ids[:, 9::2], batch.hard[:, 9::2]
    shares = [hard[asked == token].mean() for token in range(3, 11)]
    assert max(shares) - min(shares) < 0.05


def test_text_and_bad_settings():
    examples = world("pointers", task="arrows").examples(100, 4)
    assert {len(example.steps) for example in examples} == {0, 1}
    assert all(example.extra["hard"] == bool(example.steps) and example.answer not in example.steps for example in examples)
    for settings in ({"task": "x"}, {"nodes": 2}):
        with pytest.raises(SettingsError):
            world("pointers", **settings)
    with pytest.raises(SettingsError, match="Did you mean 'pointers'"):
        world("pointer")
    with pytest.raises(SettingsError, match="'base' or 'tuned'"):
        world("pointers").batch(1, 0, "x")
