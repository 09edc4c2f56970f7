"""Invariants of adaptive models where no official number exists: every filter, untied and GPT-2 backbones, text models, slices, arms."""

from types import SimpleNamespace

import pytest
import torch
from adaptive_fixture import numbers

from lab.data.examples import Dataset, Example
from lab.errors import DataError, SettingsError
from lab.latent.record import Response
from lab.methods.adaptive import report, stages, toy
from lab.methods.adaptive.config import AdaptiveSettings, Distil
from lab.methods.adaptive.data import Writer, numeric, prepare, slice_of
from lab.methods.adaptive.model import AdaptiveModel, check_ids, read_ids, scores
from lab.methods.adaptive.objective import SFT, batch_of
from lab.methods.adaptive.policy import generate
from lab.models.backbones import load_backbone

CODI = dict(factor=1, bias=2, weight_codi=2.0, distance="smooth_l1", scale="layerwise_std")


def fresh(name="toy:llama-micro", filter="MLP", tied=True, **changes):
    tokenizer = toy.tokenizer()
    backbone = load_backbone(name, vocab_size=len(tokenizer), tied=tied)
    return AdaptiveModel.start(backbone, tokenizer, AdaptiveSettings(filter=filter, **changes), multiple=1).eval()


def logits_of(model, ids):
    with torch.no_grad():
        return scores(model.thinker, ids, read_ids(model.thinker, ids).last)


def thinking_ids(model):
    s = model.config
    return torch.tensor([[6, 12, 11, s.start, s.go_on, s.go_on, s.stop, 7, 8], [6, 13, 11, s.start, s.go_on, s.stop, 7, 8, 9]])


@pytest.mark.parametrize("filter", ["MLP", "linear", "linear_ln", "linear_ECF", "SRE", "none"])
def test_every_filter_trains_and_generates(filter):
    model = fresh(filter=filter)
    data = toy.examples(4, 1)
    rows = prepare(data, Writer(model.tokenizer, model.config, Distil(**CODI))).rows
    loss, parts = SFT(Distil(**CODI))(model, batch_of(rows))
    loss.backward()
    learning = [p for p in model.parts.parameters()]
    assert loss.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in learning)
    assert bool(learning) == (filter not in ("SRE", "none"))
    found = generate(model, data, thoughts=3, max_new_tokens=4)
    assert {row.thoughts for row in found.rows} == {3}


@pytest.mark.parametrize(("filter", "ending"), [("MLP", False), ("MLP", True), ("SRE", True)])
def test_training_reads_what_ids_say(filter, ending):
    """The student's loss against one call for each thinking column over whole rows of ids."""
    model, distil = fresh(filter=filter, add_latent_to_end=ending), Distil(**CODI)
    s, total, count = model.config, 0.0, 0
    rows = prepare(toy.examples(4, 1), Writer(model.tokenizer, s, distil)).rows
    for teacher, student in rows:
        said = [s.start, *[s.go_on] * student.thoughts, s.stop, *student.after[1:]]
        logits = logits_of(model, torch.tensor([[*teacher.prompt, *said]]))[0, len(teacher.prompt) - 1 : -1]
        total, count = total + torch.nn.functional.cross_entropy(logits, torch.tensor(said), reduction="sum"), count + len(said)
    _, parts = SFT(distil)(model, batch_of(rows))
    torch.testing.assert_close(parts["student_ce"].detach(), total / count, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("modules", [False, True])
def test_the_soft_reembedding_weighs_every_id_the_vocabulary_head_may_say(modules):
    model = fresh(filter="SRE")
    if modules:
        model.add_lora(2, 4, 0.0, ["q_proj"])
    h, s = torch.randn(3, model.backbone.config.hidden_size), model.config
    table = model.backbone.get_input_embeddings().weight.detach().clone()
    table[s.start] = model.thinker.vector("start", "in")
    logits = (h @ table.T).index_fill(-1, torch.tensor([s.end, s.go_on, s.stop, *s.unused]), -torch.inf)
    torch.testing.assert_close(model.thinker.feedback(h).detach(), logits.softmax(-1) @ table, atol=1e-5, rtol=1e-5)


def test_the_ecf_filter_starts_from_the_embeddings():
    model = fresh(filter="linear_ECF")
    rows = model.backbone.get_input_embeddings().weight[: len(model.tokenizer)]
    filter = model.parts.recurrent_filter
    torch.testing.assert_close(filter.layer.weight, rows.T @ rows / len(rows))
    assert float(filter.norm.weight[0].detach()) == pytest.approx(float(rows.norm(dim=1).mean().detach()) / rows.shape[1] ** 0.5)


@pytest.mark.parametrize(("name", "tied"), [("toy:llama-micro", False), ("toy:qwen3-micro", True), ("toy:gpt2-micro", True)])
def test_special_modules_and_merging_change_nothing(name, tied):
    model = fresh(name, tied=tied)
    ids, before = thinking_ids(model), None
    before = logits_of(model, ids)
    targets = ["c_attn", "c_proj", "c_fc"] if "gpt2" in name else ["q_proj", "up_proj"]
    model.add_lora(2, 4, 0.0, targets)
    assert model.config.special == ("tied" if tied else "untied")
    torch.testing.assert_close(logits_of(model, ids), before, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        for parameter in [p for p in model.parameters() if p.requires_grad]:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    moved = logits_of(model, ids)
    assert not torch.allclose(moved.nan_to_num(0, 0, 0), before.nan_to_num(0, 0, 0), atol=1e-3)
    assert report.merge_gap(model) < 1e-4
    torch.testing.assert_close(logits_of(model, ids), moved, atol=1e-4, rtol=1e-4)
    assert not any("lora" in name for name, _ in model.backbone.named_parameters())


@pytest.mark.parametrize("name", ["toy:gpt2-micro", "toy:qwen2-micro"])
def test_padding_changes_nothing(name):
    model = fresh(name)
    ids = thinking_ids(model)
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), ids), 1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    with torch.no_grad():
        out = read_ids(model.thinker, padded, mask).last[:, 3:]
        columns = read_ids(model.thinker, padded, mask, columns=True).last[:, 3:]
        alone = read_ids(model.thinker, ids).last
    torch.testing.assert_close(out, alone, atol=1e-5, rtol=1e-5)
    assert torch.allclose(columns, alone, atol=1e-5) is ("gpt2" not in name)  # the official shift on absolute positions


def test_the_last_thought_can_be_added_to_the_end():
    model = fresh(add_latent_to_end=True)
    plain = logits_of(fresh(), thinking_ids(model))
    assert not torch.allclose(logits_of(model, thinking_ids(model))[:, -1].nan_to_num(0, 0, 0), plain[:, -1].nan_to_num(0, 0, 0))
    found = generate(model, toy.examples(2, 1), thoughts=2, max_new_tokens=3)
    row = found.rows[0]
    s = model.config
    ids = torch.tensor([[*row.prompt, s.go_on, s.go_on, s.stop, *row.ids[:-1]]])
    said = logits_of(model, ids)[0, len(row.prompt) + 2 :]
    assert row.ids[-1] >= 0 and said.shape[0] == len(row.ids)


def test_ids_out_of_place_are_named():
    s = fresh().config
    for bad in ([s.go_on], [s.start, 7], [s.end], [s.start, s.go_on, 7]):
        with pytest.raises(DataError, match="does not belong there"):
            check_ids(bad, s)


def test_detaching_the_head_spares_the_thoughts():
    grads = {}
    for detach in (True, False):
        model = fresh(detach_head=detach)
        model.add_lora(2, 4, 0.0, ["q_proj"])
        ids = thinking_ids(model)
        states = read_ids(model.thinker, ids).last
        model.thinker.decide(states[:, 4]).sum().backward()
        grads[detach] = model.parts.recurrent_filter.input_layer.weight.grad
    assert grads[True] is None and grads[False].abs().sum() > 0


def test_a_sequence_begins_as_its_tokenizer_begins_one():
    from adaptive_fixture import tokenizer

    named = toy.tokenizer()
    named.bos_token = named.eos_token  # GPT-2: named, and never put in front
    for t, bos in ((named, []), (tokenizer(), [tokenizer().bos_token_id])):
        writer = Writer(t, AdaptiveSettings())
        assert writer.question("7") == bos + writer.piece(writer.s.prefix + "7")


def test_slices_are_the_official_ones():
    official = numbers("slices")["sets"]
    for count in (20, 1000):
        data = Dataset("x", "train", tuple(Example(str(i), "q", (), "1") for i in range(count)))
        sft, rl = slice_of(data, 0.85), slice_of(data, 0.15, last=True)
        wanted = official[str(count)]
        assert [int(e.id) for e in sft[: len(wanted["sft_first"])]] == wanted["sft_first"]
        assert [int(e.id) for e in rl[: len(wanted["rl_first"])]] == wanted["rl_first"]
        assert (len(sft), len(rl)) == (wanted["sft_len"], wanted["rl_len"])
        assert not {e.id for e in sft} & {e.id for e in rl}


def test_answers_that_are_no_numbers():
    assert [numeric(text) for text in ("1,061", "-6", "1/2", "inf", "nan", "")] == [1061.0, -6.0, None, None, None, None]


def test_arms_differ_in_their_losses_only():
    given = Distil(**CODI)
    assert stages.arm(given, "meaned").weight_mean == 2.0 and stages.arm(given, "meaned").weight_codi == 0
    assert stages.arm(given, "none").scale == "" and stages.arm(given, "none").thoughts(2) == 4
    with pytest.raises(SettingsError, match="Unknown arm"):
        stages.arm(given, "codii")
    base = fresh()
    text = stages.copy_for(base, stages.arm(given, "no cot"), {})
    assert not text.config.latent and base.config.latent
    table, answers = report.evaluate(text, toy.examples(3, 2), max_new_tokens=3)
    assert all(row.thoughts == 0 for row in answers.rows) and table["questions"] == 3


def test_evaluation_counts_both_ways():
    model = fresh()
    table, _ = report.evaluate(model, toy.examples(3, 2), 2, max_new_tokens=6)
    assert table["thoughts"] == 2 and table["length"] == 4 and table["bad_format"] == 0
    swept = report.by_count(model, toy.examples(3, 2), [0, 1], max_new_tokens=6)
    assert [row["thoughts"] for row in swept] == [0, 1]


def test_words_that_a_toy_does_not_know_are_counted_too(monkeypatch):
    row = Response(0, 0, [], [], [], "eos", "12 pears The answer is: 5", thoughts=1)
    monkeypatch.setattr(report, "generate", lambda *args, **options: SimpleNamespace(rows=[row]))
    table, _ = report.evaluate(fresh(), [Example("a", "q", (), "5")])
    assert (table["score"], table["length"], table["bad_format"]) == (1, 2 + 3, 0)


def test_rows_and_batches_without_thoughts_are_learned_from_all_the_same():
    model = fresh()
    distil = Distil(factor=1, bias=-1, weight_mean=2.0, distance="smooth_l1", scale="layerwise_std")
    rows = prepare(toy.examples(16, 1), Writer(model.tokenizer, model.config, distil)).rows
    none = [pair for pair in rows if pair[1].thoughts == 0]
    loss, count = SFT(distil), SFT(distil).count
    assert 0 < len(none) < len(rows) and count(batch_of(rows))["mean_reasoning"] == len(rows) - len(none)
    for chosen in (rows, none):
        value, parts = loss(model, batch_of(chosen))
        value.backward()
        assert value.isfinite() and parts["student_ce"] > 0
    assert float(loss(model, batch_of(none))[1]["mean_reasoning"]) == 0 and count(batch_of(none))["mean_reasoning"] == 0
