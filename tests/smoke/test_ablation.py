"""Changing thoughts changes what should change and nothing else, wherever they stand."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from lab.ablation import INTERVENTIONS, Subject, Thoughts, ablate, subject_of
from lab.ablation.interventions import Observed, Patched, Replaced, as_is, swapped, without, zeroed
from lab.ablation.table import _Run
from lab.data.examples import Example
from lab.errors import RunError, SettingsError
from lab.latent.edit import READ, Edit, Place
from lab.latent.sampling import Sampling
from lab.models.backbones import load_backbone
from lab.models.layouts import load
from lab.models.tokenizers import byte_tokenizer, word_tokenizer

TAH = Path(__file__).parents[1] / "fixtures" / "tah" / "checkpoint_official_layout"
QUESTIONS = ["1+1?", "a longer question, 12 by 12?", "3?", "7-2?", "how many? 4 and 4", "9?"]
WORDS = ["Q", *(f"w{i}" for i in range(20)), "####"]


def coconut(arch):
    from lab.methods.coconut.config import CoconutSettings
    from lab.methods.coconut.model import CoconutModel

    tokenizer = byte_tokenizer()
    backbone = load_backbone(f"toy:{arch}-micro", layers=2, vocab_size=len(tokenizer), initializer_range=0.5)
    return CoconutModel.start(backbone, tokenizer, CoconutSettings(thoughts=3)), QUESTIONS, {}


def codi():
    from lab.methods.codi.config import CodiSettings
    from lab.methods.codi.model import CodiModel

    backbone = load_backbone("toy:llama-micro", layers=2, vocab_size=320, initializer_range=0.5)
    return CodiModel.start(backbone, byte_tokenizer(), CodiSettings(num_latent=2, lora_r=0, prj_dim=16)), QUESTIONS, {}


def adaptive():
    from lab.methods.adaptive import toy
    from lab.methods.adaptive.config import AdaptiveSettings
    from lab.methods.adaptive.model import AdaptiveModel

    tokenizer = toy.tokenizer()
    model = AdaptiveModel.start(toy.backbone("toy:llama-tiny", len(tokenizer), 0), tokenizer, AdaptiveSettings(), multiple=1)
    return model, [f"op{i} op{i % 3} Q {i}" for i in range(6)], {"max_thoughts": 4, "sampling": Sampling(temperature=1.0)}


def colar():
    from lab.methods.colar import stages, toy
    from lab.methods.colar.config import ColarSettings

    settings = ColarSettings.check(lora_r=0, max_compression_factor=3, lp_intermediate_size=32)
    return toy.untrained("toy:llama", 0, settings), toy.examples("test", 6, 0), {**stages.decoding(False), "thoughts": 4}


def gated(**settings):
    from lab.methods.dtt.config import BOT, EOT, GatedSettings
    from lab.methods.dtt.model import SparseGatedModel

    tokenizer = word_tokenizer(WORDS, special=(BOT, EOT))
    backbone = load_backbone("toy:gpt2", vocab_size=len(tokenizer), initializer_range=0.3, max_positions=64)
    model = SparseGatedModel.start(backbone, tokenizer, GatedSettings(bias=0.0, bot_in_prompt=True, **settings))
    return model, [[1, 2, 3, 4], [5, 6], [7, 8, 9], [3, 3], [9], [2, 6, 5]], {}


def tah():
    model = load(TAH)
    model.set_threshold(0.45)
    generator = torch.Generator().manual_seed(0)
    return model, [torch.randint(5, 60, (n,), generator=generator).tolist() for n in (4, 9, 5, 5, 7, 6)], {}


def prefix(arm):
    import numpy as np

    from lab.methods.lta import toy

    base = load_backbone("toy:qwen3", vocab_size=len(toy.WORLD.vocabulary), initializer_range=0.2, **toy.SIZES)
    model = toy.start(arm, base, 0)
    asked = toy.questions(toy.WORLD.task(6, np.random.default_rng(0)), 4, solution=False, distinct=model.config.distinct_slots)
    return model, asked, {"sampling": Sampling()}


MAKERS = {
    "coconut, gpt2": lambda: coconut("gpt2"),
    "coconut, qwen3": lambda: coconut("qwen3"),
    "codi": codi,
    "adaptive": adaptive,
    "colar": colar,
    "dtt": gated,
    "dtt, soft": lambda: gated(hard=False),
    "hrpo": lambda: gated(gate="hrpo", r_min=0.1, r_max=0.5),
    "tah": tah,
    "lta": lambda: prefix("lta"),
    "softcot": lambda: prefix("softcot"),
}
everywhere = pytest.mark.parametrize("name", MAKERS)


@cache
def subject(name, layers=False):
    """A tiny random model of a method, and what it thought by itself; `right` is arbitrary but not constant."""
    torch.manual_seed(0)
    model, questions, options = MAKERS[name]()
    gold = list(range(len(questions)))
    options = {"max_new_tokens": 8, **options}
    made = Subject(model.eval(), list(questions), gold, lambda row, number: sum(row.ids) % 3 == number % 3, options)
    count = model.backbone.config.num_hidden_layers + 1
    return made, _Run(made, list(range(count)) if layers else [], {"seed": 0, **options})


def alike(answers, others):
    """The same words with the same probabilities up to rounding: a patched prompt is read by other products than a plain one."""
    same = [row.ids for row in answers] == [row.ids for row in others] and [row.finish for row in answers] == [row.finish for row in others]
    return same and all(row.logprobs == pytest.approx(other.logprobs, abs=1e-5) for row, other in zip(answers, others, strict=True))


@everywhere
def test_looking_and_giving_back_the_same_changes_nothing_at_all(name):
    one, run = subject(name, True)
    untouched = one.model.generate(one.questions, seed=0, **one.options).rows
    assert int(run.own.counts.max()) > 1 and alike(run.answers, untouched)
    for edit in (Edit(), Replaced(run.own, as_is), Replaced(run.own, without(99))):
        assert alike(run.ask(edit), untouched)
    own = lambda x, place, own, seed: own.of(own.row(place), place.step)[0]  # noqa: E731
    assert alike(run.ask(Replaced(run.own, own)), untouched)
    for layer in run.layers:
        assert alike(run.ask(Patched(run.own, layer, run.own)), untouched)


@everywhere
def test_every_intervention_reaches_the_model_and_none_depends_on_the_batch(name):
    one, run = subject(name, True)
    first = len(run.layers) // 2
    edits = {
        n: Replaced(run.own, *INTERVENTIONS[n]) for n in ("zeroed", "mean", "another question's", "noise", "first half", "none at all")
    }
    edits |= {"layer": Patched(run.own.taken(run.own.donors), first, run.own), "step": Replaced(run.own, without(0))}
    for what, edit in edits.items():
        found = run.ask(edit)
        assert not alike(found, run.answers), what
        options = {**run.options, "batch": 1}
        alone = one.model.generate(one.questions, edit=edit, **options).rows
        assert [row.ids for row in alone] == [row.ids for row in found], what
        for a, b in zip(alone, found, strict=True):
            torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), rtol=1e-4, atol=1e-4)


@everywhere
def test_fewer_thoughts_are_fewer(name):
    _, run = subject(name)
    fewer = Observed()
    fewer.most = Replaced(run.own, as_is, 0.5).most
    run.ask(fewer)
    made, wanted = fewer.thoughts(len(run.answers), 1, 1, True).counts, run.own.counts // 2
    assert (made <= wanted).all() and (not run.own.fixed or torch.equal(made, wanted))
    none = Observed()
    none.most = Replaced(run.own, as_is, 0.0).most
    run.ask(none)
    assert none.thoughts(len(run.answers), 1, 1, True) is None


@pytest.mark.parametrize("name", ["coconut, qwen3", "codi", "tah", "lta"])
def test_what_enters_the_first_block_is_what_is_read(name):
    """Where positions are rotations, patching hidden state 0 is replacing the vector."""
    _, run = subject(name, True)
    vectors = run.ask(
        Replaced(
            run.own,
            lambda x, place, own, seed: torch.where(own.of(own.donors[own.row(place)], place.step)[1], swapped(x, place, own, seed), x),
        )
    )
    assert alike(run.ask(Patched(run.own.taken(run.own.donors), 0, run.own)), vectors)


def test_a_patch_is_what_a_hook_on_the_model_itself_does():
    """One thought, one layer: the same numbers as transformers' own forward with that hidden state exchanged."""
    one, _ = subject("coconut, gpt2")
    model, layer, other = one.model, 1, torch.linspace(-1, 1, one.model.backbone.config.hidden_size)
    run = _Run(one, [layer], {"thoughts": 1, "max_new_tokens": 1, "seed": 0})
    own = replace(run.own, states={layer: other.expand(len(run.answers), 1, -1)})
    (found,) = model.generate(one.questions[:1], edit=Patched(own, layer, own), top=1, **run.options).rows
    prompt, _ = model.prompt(one.questions[0], 1)
    embed = model.backbone.get_input_embeddings()
    x = torch.cat((embed(torch.tensor([prompt])), run.own.vectors[:1, :1], embed(torch.tensor([[model.config.end_id]]))), 1)

    def hook(module, args, output):
        h = output[0] if isinstance(output, tuple) else output
        h[:, len(prompt)] = other
        return output

    handle = model.backbone.transformer.h[layer - 1].register_forward_hook(hook)
    with torch.no_grad():
        logits = model.backbone(inputs_embeds=x).logits[0, -1]
    handle.remove()
    logits[[model.config.start_id, model.config.end_id, model.config.latent_id]] = -torch.inf
    best = int(logits.argmax())
    assert best == (found.ids or [model.config.eos_id])[0]
    assert found.logprobs == pytest.approx([float(logits.log_softmax(-1)[best])], rel=1e-4) or not found.ids


def test_thoughts_left_out_of_a_prompt_leave_no_gap():
    """Half of a prefix model's thoughts are masked: the answer is that to a prompt with the other half alone."""
    from lab.latent.loop import Budget, rollout
    from lab.latent.policy import Policy
    from lab.latent.prefix import inject

    one, run = subject("lta")
    found = run.ask(Replaced(run.own, as_is, 0.5))
    decoder, rows = one.model.decoder, [question.row for question in one.questions]
    prompt = inject(decoder, [list(r.prompt) for r in rows], run.own.vectors[:, :2], [list(r.after) for r in rows])
    done = rollout(decoder, Policy(decoder, (one.model.config.eos_id,)), prompt, budget=Budget(answer=8))
    assert done.answers() == [row.ids for row in found]


def thoughts():
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([3, 1, 2, 3])
    own = Thoughts(torch.randn(4, 3, 5, generator=generator), counts)
    return replace(own, vectors=own.vectors * own.real)


def everywhere_in(own):
    question, step = own.real[..., 0].nonzero(as_tuple=True)
    return own.vectors[question, step], Place(question, torch.zeros_like(question), step)


@pytest.mark.parametrize("name", [name for name, (_, share) in INTERVENTIONS.items() if share == 1])
def test_what_an_intervention_makes_of_a_table(name):
    own = thoughts()
    x, place = everywhere_in(own)
    new = Replaced(own, *INTERVENTIONS[name])(x, place)
    assert new.shape == x.shape and torch.equal(Replaced(own, as_is).most(torch.arange(4), torch.zeros(4, dtype=torch.long)), own.counts)
    if name == "noise":
        torch.testing.assert_close(new.norm(dim=-1), x.norm(dim=-1))
    if name == "shuffled":
        sums = lambda values: torch.zeros(4, 5).index_add(0, place.question, values)  # noqa: E731
        torch.testing.assert_close(sums(new), sums(x))
    if name == "mean":
        torch.testing.assert_close(new[0], own.vectors[:, 0].mean(0))
    if name == "another question's":
        assert sorted(own.donors.tolist()) == [0, 1, 2, 3] and (own.donors != torch.arange(4)).all()
        assert (new != x).any(-1).all()


def test_leaving_one_out_is_its_mean_and_the_others_live_or_stay():
    own = thoughts()
    x, place = everywhere_in(own)
    mean = own.vectors[[0, 2, 3], 1].mean(0)
    for frozen, other in ((False, x + 1), (True, x)):
        new = Replaced(own, without(1, frozen))(x + 1, place)
        assert torch.equal(new[place.step != 1], other[place.step != 1])
        torch.testing.assert_close(new[place.step == 1], mean.expand(3, -1))


def test_samples_and_sets_of_a_question_stay_together():
    one, _ = subject("coconut, gpt2")
    run = _Run(one, [], {**one.options, "samples": 2, "seed": 0})
    assert (run.own.donors % 2 == torch.tensor([0, 1] * 6)).all() and (run.own.donors // 2 != torch.arange(12) // 2).all()
    row = run.row("x", "", run.ask(Replaced(run.own, zeroed)), run.answers)
    assert row["questions"] == 6 and row["low"] <= row["accuracy"] <= row["high"]


@pytest.mark.parametrize("samples", [1, 4])
def test_sets_of_thoughts_are_replaced_by_the_same_set_of_another_question(samples):
    from test_lta_prompting import TOKENIZERS

    from lab.methods.lta.config import LtaSettings
    from lab.methods.softcot.model import SoftcotModel

    shape = {"vocab_size": 272, "hidden": 32, "heads": 4, "kv_heads": 2, "layers": 2, "initializer_range": 0.2}
    settings = LtaSettings.check(generator="assistant", num_thought_tokens=2, num_scaling_times=2, family="qwen3")
    base, small = (load_backbone("toy:qwen3", seed=seed, **shape) for seed in (0, 1))
    model = SoftcotModel.start(base, TOKENIZERS["qwen3"], settings, assistant=small)
    model.use_assistant(small, start_ids=[40, 41])
    one = Subject(model.eval(), QUESTIONS, QUESTIONS, lambda row, gold: len(row.ids) % 2 == len(gold) % 2, {"sampling": Sampling()})
    run = _Run(one, [1], {"samples": samples, "max_new_tokens": 4, "seed": 0, **one.options})
    assert len(run.answers) == 6 * samples and len(run.own.counts) == 6 * 2 * max(1, samples // 2)
    each, row = run.own.each, torch.arange(len(run.own.counts))
    assert (run.own.donors % each == row % each).all() and (run.own.donors // each != row // each).all()
    assert alike(run.ask(Patched(run.own, 1, run.own)), run.answers)
    assert all(len(found["intervention"]) and found["questions"] == 6 for found in run.patched(1))


def test_the_table():
    one, _ = subject("coconut, qwen3")
    rows = {row["intervention"]: row for row in ablate(one, each=3, layers=None)}
    layers = one.model.backbone.config.num_hidden_layers + 1
    assert len(rows) == 1 + len(INTERVENTIONS) + 3 + 2 + 2 * layers
    own = rows["as they are"]
    assert own["changed"] == own["difference"] == 0 and rows["zeroed"]["changed"] > 0
    for row in rows.values():
        assert row["low"] <= row["accuracy"] <= row["high"] and row["questions"] == 6
        asked = own["accuracy"] if row["kind"] != "clean into corrupted" else None
        assert asked is None or row["difference"] == pytest.approx(row["accuracy"] - asked)
        assert (row["other"] == row["other"]) == (row["layer"] != READ or row["intervention"] == "another question's")


def test_mistakes_get_one_sentence():
    plain = load("toy:gpt2-micro")
    asked = Subject(plain, QUESTIONS, QUESTIONS, lambda row, gold: False, {"max_new_tokens": 2})
    with pytest.raises(SettingsError, match="made no thoughts"):
        ablate(asked)
    with pytest.raises(SettingsError, match="zeroed"):
        ablate(asked, interventions=("zeroo",))
    with pytest.raises(SettingsError, match="hidden states 0 to 1"):
        ablate(asked, layers=(7,))
    assert Example("a", "b", answer="c") == Example("a", "b", answer="c"), "gold answers are compared"


def test_a_run_is_asked_as_its_own_evaluation_asks(outputs):
    from lab.data.source import Source, words_of
    from lab.files import write_json
    from lab.methods.coconut.config import CoconutSettings
    from lab.methods.coconut.model import CoconutModel

    values = {"benchmark": "permutations", "hops": 2, "train_problems": 8, "test_problems": 5, "seed": 0}
    source = Source.check(**values)
    tokenizer = word_tokenizer(words_of((source.train(), source.held_out()), ["###"]))
    backbone = load_backbone("toy:gpt2-micro", vocab_size=len(tokenizer))
    model = CoconutModel.start(backbone, tokenizer, CoconutSettings(thoughts=2))
    run = outputs / "coconut" / "one"
    model.save(run / "train" / "coconut")
    about = {"paper": "coconut", "recipe": "toy", "planned": ["train"], "steps": {"train": {"status": "done"}}}
    write_json(run / "manifest.json", about)
    with pytest.raises(RunError, match="no finished step 'evaluate'"):
        subject_of(str(run))
    (run / "evaluate").mkdir()
    write_json(run / "evaluate" / "step.json", {"parameters": values | {"max_new_tokens": 3}})
    for place in (run, run / "train", run / "train" / "coconut", ""):
        found = subject_of(str(place), "coconut", sampling=Sampling())
        assert [e.question for e in found.questions] == [e.question for e in source.held_out()]
        assert found.name == "coconut" and set(found.options) == {"max_new_tokens", "sampling"} and found.first(2).gold == found.gold[:2]
    answer = found.model.generate(found.questions[:1], **found.options).rows[0]
    assert found.right(replace(answer, text=f"### {found.gold[0]}"), found.gold[0]) and not found.right(answer, found.gold[0])
    with pytest.raises(SettingsError, match="'train/cocnut'.*Did you mean 'train/coconut'"):
        subject_of(str(run), arm="cocnut")
    write_json(run / "manifest.json", {"paper": "mini", "steps": {}})
    with pytest.raises(SettingsError, match="mini"):
        subject_of(str(run))
