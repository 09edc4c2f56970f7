"""Numbers of the official adaptive code on a tiny random model: forward, data, losses and gradients."""

import pytest
import torch
from adaptive_fixture import lora_model, numbers, tensors, tokenizer

from lab.data.examples import Example
from lab.errors import DataError, SettingsError
from lab.latent.unroll import unroll
from lab.methods.adaptive.checkpoint import lora_weights
from lab.methods.adaptive.config import Distil
from lab.methods.adaptive.data import Writer, prepare
from lab.methods.adaptive.model import read_ids, scores
from lab.methods.adaptive.objective import SFT, batch_of

FLAT6 = dict(least=6, most=6)
DATA = {
    "cot": dict(mode="cot"),
    "no_cot": dict(mode="no cot"),
    "cot_nl": dict(mode="cot", sentences=True),
    "latent6": dict(FLAT6, remove_last_step=True, remove_negative=True, shift_target=True),
    "latent6by1": dict(factor=1, bias=5, most=10, remove_last_step=True, remove_negative=True, shift_target=True),
    "appendix_codi": dict(FLAT6, remove_last_step=True, remove_negative=True, shift_target=True, mask_thought_labels=True),
    "appendix_meaned": dict(FLAT6, shift_target=True, mask_thought_labels=True),
    "latent6_noshift": dict(FLAT6),
}
CODI = dict(weight_codi=20.0, distance="smooth_l1", scale="layerwise_std")
LOSSES = {
    "latent6": CODI,
    "appendix_codi": CODI,
    "appendix_meaned": dict(weight_mean=20.0, distance="smooth_l1", scale="layerwise_std"),
    "mean_l2_none": dict(weight_codi=1.0, weight_mean=1.0, distance="mean_l2", scale="none"),
    "smooth_avg_l2": dict(weight_codi=1.0, distance="smooth_l1", scale="avg_l2"),
    "cot_sft": {},
    "latent6by1_detach_binary_head": CODI,
}


@pytest.fixture(scope="module")
def model():
    return lora_model()


def examples():
    rows = numbers("tokenized")["rows"]
    return [Example(str(i), row["question"], tuple(row["steps"]), row["answer"]) for i, row in enumerate(rows)]


def prepared(model, name, **more):
    return prepare(examples(), Writer(tokenizer(), model.config, Distil(**DATA[name], **more)))


@pytest.mark.parametrize("name", ["latent6", "latent6by1"])
def test_forward_gives_the_official_states_and_logits(model, name):
    given, wanted = tensors(), tensors()[f"fwd/{name}/logits"]
    ids, real = given[f"batch/{name}/latent_input_ids"], given[f"batch/{name}/latent_attention_mask"].bool()
    with torch.no_grad():
        out = read_ids(model.thinker, ids, real, taps=(2,))
        logits = scores(model.thinker, ids, out.last)
    assert torch.equal(logits.isfinite()[real], wanted.isfinite()[real])
    finite = wanted.isfinite() & real[..., None]
    torch.testing.assert_close(logits[finite], wanted[finite], atol=1e-4, rtol=0)
    torch.testing.assert_close(out.taps[2][real], given[f"fwd/{name}/mid_hidden"][real], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[:, -1].nan_to_num(0), given[f"fwd/{name}/row_last_logits_unpadded"].nan_to_num(0), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", list(DATA))
def test_rows_are_the_official_ids_labels_and_maps(model, name):
    made, official = prepared(model, name).rows, numbers("tokenized")["train"][name]["examples"]
    assert len(made) == len(official)
    for row, wanted in zip(made, official, strict=True):
        teacher = row[0] if DATA[name].get("mode", "latent") == "latent" else row
        assert [*teacher.prompt, *teacher.after] == wanted["input_ids"]
        assert list(teacher.labels) == wanted["labels"]
        asked = len(teacher.prompt)
        assert [i for i, on in enumerate(wanted["reasoning_map"]) if on] == [asked + i for i in range(*teacher.reasoning)]
        assert [i for i, on in enumerate(wanted["target_token_map"]) if on] == [asked + teacher.target]
        if teacher is not row:
            _check_student(row[1], asked, list(teacher.prompt), wanted, model.config)


def _check_student(student, asked, question, wanted, s):
    n, closed = student.thoughts, [s.stop, *student.after[1:]]
    assert [*question, *student.prompt, *[s.go_on] * n, *closed] == wanted["latent_input_ids"]
    assert [i for i, on in enumerate(wanted["latent_continue_map"]) if on] == [asked + 1 + i for i in range(n)]
    assert [i for i, on in enumerate(wanted["latent_target_token_map"]) if on] == [asked + 1 + n + student.target]
    masked = wanted["latent_labels"][asked + 1] == -100
    assert student.labels[0] == wanted["latent_labels"][asked]
    assert list(student.labels[2:]) == wanted["latent_labels"][asked + n + 2 :]
    assert masked == (student.labels[0] == -100)


@pytest.mark.parametrize("name", list(LOSSES))
def test_losses_and_gradients_are_the_official_ones(name):
    wanted = numbers("losses")["losses"][name]
    model = lora_model(detach_binary_head_inputs="detach" in name)
    distil = Distil(**DATA[wanted.get("dataset", "latent6by1").replace("cot_sft", "cot")], **LOSSES[name], compat=True)
    rows = prepare(examples(), Writer(tokenizer(), model.config, distil)).rows
    loss, parts = SFT(distil)(model, batch_of(rows))
    told = {key.removesuffix("_loss"): value for key, value in wanted["components"].items()}
    assert float(loss) == pytest.approx(told.pop("total"), rel=1e-5)
    assert {key: float(parts[key]) for key in told} == pytest.approx(told, rel=1e-5)
    for key, value in wanted.get("statistics", {}).items():
        assert float(parts[_ours(key)]) == pytest.approx(value, rel=1e-4, abs=1e-6)
    loss.backward()
    own = lora_weights(model) | dict(model.parts.named_parameters())
    for key, value in wanted["grad_norms"].items():
        grad = own[_short(key)].grad
        assert (0.0 if grad is None else float(grad.norm())) == pytest.approx(value, rel=1e-3, abs=1e-7), key


def _ours(key):
    parts = key.split("/")
    name = parts[-1].removesuffix("_loss")
    return f"{name}/scale" if "scaling" in key else f"{name}/{parts[2]}_{parts[1].split()[1].replace('-', '_')}"


def test_weight_decay_of_rl_spares_biases_and_norms_alone(model, monkeypatch, tmp_path):
    from lab.methods.adaptive import stages
    from lab.rl import RLSettings
    from lab.training.optim import parameter_groups

    seen = []
    monkeypatch.setattr(stages, "reinforce", lambda *given, **options: seen.append(given[5]))
    stages.reinforce_length(model, examples(), RLSettings(steps=1, weight_decay=1e-3), tmp_path)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, 1e-5, 1e-3, seen[0].groups)
    spared = {names[id(p)] for group in groups if not group["weight_decay"] for p in group["params"]}
    assert spared == {name for name, p in model.named_parameters() if p.requires_grad and ("norm" in name or name.endswith("bias"))}


def _short(key):
    key = key.replace("base_model.model._base_model.", "").replace("base_model.model.", "").replace(".modules_to_save.default", "")
    return key.replace(".default.weight", ".weight")


def test_official_losses_depend_on_the_micro_batch_and_ours_do_not(model):
    official = numbers("losses")["losses"]["micro_batch_2"]["components"]
    for compat in (True, False):
        distil = Distil(**DATA["latent6by1"], **CODI, compat=compat)
        rows = prepare(examples(), Writer(tokenizer(), model.config, distil)).rows
        whole, split = _by_micro_batch(model, distil, rows, 3), _by_micro_batch(model, distil, rows, 2)
        for name, value in whole.items():
            assert split[name] == pytest.approx(official[f"{name}_loss"] if compat else value, rel=1e-5), name
        assert whole["codi"] == pytest.approx(4.607, abs=1e-3)


def _by_micro_batch(model, distil, rows, size):
    """The components of one global batch, put together as the trainer does."""
    loss = SFT(distil)
    batches = [batch_of(rows[i : i + size]) for i in range(0, len(rows), size)]
    loss.prepare(model, batches)
    with torch.no_grad():
        found = [(loss(model, batch)[1], loss.count(batch)) for batch in batches]
    names = ("teacher_ce", "student_ce", "codi")
    return {n: sum(float(part[n]) * items[n] for part, items in found) / sum(items[n] for _, items in found) for n in names}


def test_aligned_training_pass_equals_the_general_one(model):
    """One column for all thoughts (1 + longest calls) against one call per thinking column."""
    pairs, s = prepared(model, "latent6by1", **CODI).rows, model.config
    ids = [[*teacher.prompt, *student.prompt, *[s.go_on] * student.thoughts, s.stop, *student.after[1:]] for teacher, student in pairs]
    for (teacher, student), row in zip(pairs, ids, strict=True):
        alone = read_ids(model.thinker, torch.tensor([row])).last[0]
        plan = batch_of(pairs).student
        at = pairs.index((teacher, student))
        question = torch.tensor([teacher.prompt])
        kv = model.thinker.grow()
        model.thinker(model.thinker.embed(question), torch.arange(question.shape[1])[None], kv)
        one = batch_of([(teacher, student)]).student
        run = unroll(
            model.thinker, one.prompt.block(model.thinker), one.counts, one.after.block(model.thinker), model.thinker.feedback, kv=kv
        )
        torch.testing.assert_close(torch.cat((run.prompt, run.states, run.after), 1)[0], alone[question.shape[1] :], atol=1e-5, rtol=1e-5)
        assert plan.counts[at] == one.counts[0]


def test_calls_are_one_and_the_longest_thought(model):
    for name, count in numbers("formats")["body_forward_calls_official"].items():
        ids = tensors()[f"batch/{name}/latent_input_ids"]
        calls = _counting(
            model.thinker, lambda ids=ids, name=name: read_ids(model.thinker, ids, tensors()[f"batch/{name}/latent_attention_mask"])
        )
        assert calls == count
        rows = prepared(model, name, **CODI).rows
        loss = SFT(Distil(**DATA[name], **CODI))
        ours = _counting(model.thinker, lambda rows=rows, loss=loss: loss(model, batch_of(rows)))
        assert ours == 3 + max(student.thoughts for _, student in rows)  # question, teacher, START, thoughts (the last with the answer)


def _counting(thinker, run):
    decoder, calls = thinker.decoder, []

    class Counted:
        def __getattr__(self, name):
            return getattr(decoder, name)

        def __call__(self, *args, **options):
            calls.append(1)
            return decoder(*args, **options)

    thinker.decoder = Counted()
    try:
        with torch.no_grad():
            run()
    finally:
        thinker.decoder = decoder
    return len(calls)


def test_unusable_examples_are_dropped_and_counted(model):
    bad = [
        Example("a", "How many?", ("<<1+1=2>>",), "inf"),
        Example("b", "How many?", ("<<1+1=2>>",), "nan"),
        Example("c", "How many?", (), "2"),
        Example("d", "How many?", ("so The answer is: 2",), "2"),
        Example("e", "How many?", ("<<1-2=-1>>",), "-1"),
        Example("f", "How many?" * 300, ("<<1+1=2>>",), "2"),
        Example("g", "  ", ("<<1+1=2>>",), "2"),
    ]
    made = prepare(bad + examples()[:1], Writer(tokenizer(), model.config, Distil(**DATA["latent6"], **CODI)))
    assert len(made.rows) == 1 and sum(made.dropped.values()) == 7
    assert "without a numeric answer" in made.note() and "answer marker" in made.note()
    with pytest.raises(DataError, match="No example is left"):
        prepare(bad, Writer(tokenizer(), model.config, Distil(**DATA["latent6"], **CODI)))
    with pytest.raises(SettingsError, match="single thought"):
        prepare(examples(), Writer(tokenizer(), model.config, Distil()))


def test_weight_decay_spares_what_the_official_groups_spare(model):
    from lab.methods.adaptive.stages import spare_specials
    from lab.train import TrainSettings
    from lab.training.optim import parameter_groups

    settings = spare_specials(model, TrainSettings(steps=1, weight_decay=0.1))
    groups = parameter_groups(model, 1e-3, 0.1, settings.groups)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {decay: {names[id(p)] for g in groups if g["weight_decay"] == decay for p in g["params"]} for decay in (0.0, 0.1)}
    official = numbers("losses")
    for decay, key in ((0.0, "no_decay"), (0.1, "decay")):
        assert {_short(name.removeprefix("backbone.").removeprefix("parts.")) for name in found[decay]} == {
            _short(n) for n in official[key]
        }


def test_lora_training_is_resumed_and_written_as_published(tmp_path):
    from lab.methods.adaptive.checkpoint import save_adapter
    from lab.methods.adaptive.stages import train_sft
    from lab.train import TrainSettings

    distil = Distil(**DATA["latent6"], **CODI)
    settings = TrainSettings(steps=4, global_batch=2, micro_batch=1, lr=1e-3, save_every=1, device="cpu")
    whole, parted = lora_model(), lora_model()
    train_sft(whole, examples(), distil, settings, tmp_path / "whole")

    def kill(**row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_sft(parted, examples(), distil, settings.but(log_every=3), tmp_path / "parted", kill)
    fresh = lora_model()
    result, _ = train_sft(fresh, examples(), distil, settings.but(log_every=3), tmp_path / "parted")
    assert result.resumed_from in (2, 3)
    wanted, found = (lora_weights(m) | dict(m.parts.named_parameters()) for m in (whole, fresh))
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert fresh.config.head_trained and fresh.config.most_trained == 6 and fresh.config.fixed_count == 6
    assert (save_adapter(fresh, tmp_path / "out", "base") / "adapter_model.safetensors").is_file()
