"""The whole way of a thought: prompt, generator, training, answering, files; for every generator."""

import json

import numpy as np
import pytest
import torch
from test_lta_prompting import TOKENIZERS

import lab
from lab.ablation import ablate
from lab.ablation.subjects import of_hidden_instructions
from lab.data.examples import Example
from lab.errors import CheckpointError, DataError, SettingsError
from lab.latent.distill import plan_cross_entropy
from lab.latent.prefix import read_with_thoughts
from lab.latent.sampling import Sampling
from lab.methods.lta import objective, policy, stages, toy
from lab.methods.lta.checkpoint import export_official
from lab.methods.lta.config import LtaSettings
from lab.methods.lta.losses import alignment, answer_vector, focus
from lab.methods.lta.model import ThoughtModel
from lab.methods.lta.objective import counter, info_nce, loss
from lab.methods.lta.policy import prompted, to_batch
from lab.methods.lta.prompting import Pack, build, own_pack
from lab.methods.softcot.model import SoftcotModel
from lab.models.backbones import load_backbone
from lab.train import TrainSettings, fit

EXAMPLES = [
    Example("a", "Tom has 3 pens and buys 4. How many?", ("3+4=7",), "7"),
    Example("b", "A cow eats 5, then 6, then 7 apples. How many in all?", ("5+6=11", "11+7=18"), "18"),
]
GREEDY = {"sampling": Sampling(), "max_new_tokens": 6}


def base(seed=0, hidden=32):
    return load_backbone("toy:qwen3", vocab_size=272, seed=seed, hidden=hidden, heads=4, kv_heads=2, layers=2, initializer_range=0.2)


def model(kind="block", cls=ThoughtModel, **settings):
    tokenizer = TOKENIZERS["qwen3"]
    settings = LtaSettings.check(**{"generator": kind, "num_thought_tokens": 3, "family": "qwen3", "inner": 48, **settings})
    torch.manual_seed(1)
    return cls.start(base(), tokenizer, settings, assistant=base(5, 24) if kind == "assistant" else None)


def batch(m, split="train", n=3):
    where = {"family": "qwen3", "task": "gsm8k", "split": split, "distinct": m.config.distinct_slots}
    return to_batch(m, [build(example, n, tokenizer=m.tokenizer, **where) for example in EXAMPLES])


SFT = {"kl_loss_weight": 0.0, "contrastive_loss_weight": 0.0, "sft_loss_weight": 1.0}


@pytest.mark.parametrize(("kind", "weights"), [("block", {}), ("assistant", {}), ("assistant", SFT), ("static", {})])
def test_only_the_generator_learns(kind, weights):
    m = model(kind, **weights).train()
    value, parts = loss(m, batch(m))
    value.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for name, p in m.parts.named_parameters() if "in_proj_bias" not in name)
    assert all(p.grad is None for p in m.backbone.parameters())
    assert set(parts) == ({"sft"} if weights or kind == "static" else {"sft", "con", "kl"})


@pytest.mark.parametrize("averaged", [True, False])
def test_an_accumulated_step_can_be_the_mean_of_its_micro_batches(averaged, tmp_path):
    m, told = model(mean_of_means=averaged), []
    rows = [build(example, 3, tokenizer=m.tokenizer, family="qwen3", task="gsm8k", split="train") for example in EXAMPLES]
    each = [float(loss(m.train(), to_batch(m, [row]))[0].detach()) for row in rows]
    how = TrainSettings(steps=1, global_batch=2, micro_batch=1, save_every=0, log_every=1, device="cpu")
    fit(m, rows, lambda some: to_batch(m, some), loss, how, tmp_path, lambda **row: told.append(row), count=counter(m))
    assert (told[0]["loss"] == pytest.approx(sum(each) / 2, rel=1e-5)) is averaged


def test_hiding_the_solution_is_the_same_as_not_showing_it():
    shown, hidden = model(gold_steps="visible"), model(gold_steps="masked")
    hidden.parts.load_state_dict(shown.parts.state_dict())
    with torch.no_grad():
        train, test = batch(hidden), batch(hidden, "test")
        torch.testing.assert_close(hidden.make(train), hidden.make(test), atol=1e-5, rtol=1e-5)
        assert (shown.make(train) - shown.make(test)).abs().max() > 1e-3


def test_hiding_the_solution_from_an_assistant_is_the_same_as_not_showing_it():
    hidden = model("assistant", gold_steps="masked")
    with torch.no_grad():
        train, test = batch(hidden), batch(hidden, "test")
        torch.testing.assert_close(hidden.make(train), hidden.make(test), atol=1e-5, rtol=1e-5)
        shown = model("assistant", gold_steps="visible")
        assert (shown.make(train) - shown.make(test)).abs().max() > 1e-3
        assert shown.shape(train)[2].shape == (2, 2, 32), "the longer of the two has two steps"


def test_sets_of_thoughts_do_not_see_a_hidden_solution():
    m = softcotpp()
    m.settings = m.config.but(gold_steps="masked").model_dump(mode="json")
    torch.testing.assert_close(m.make(batch(m)), m.make(batch(m, "test")), atol=1e-5, rtol=1e-5)
    m.settings = m.config.but(gold_steps="visible").model_dump(mode="json")
    assert (m.make(batch(m)) - m.make(batch(m, "test"))).abs().max() > 1e-3


@pytest.mark.parametrize("generator", ["block", "assistant"])
def test_training_prompts_without_gold_steps_are_those_of_testing(generator):
    m = model(generator, SoftcotModel if generator == "assistant" else ThoughtModel, gold_steps="off")
    (shown, *_), (asked, *_) = (stages.prompts(m, EXAMPLES, split).rows for split in ("train", "test"))
    assert not shown[0].steps and (shown[0].assistant, shown[0].slots) == (asked[0].assistant, asked[0].slots)
    m.settings = m.config.but(gold_steps="masked").model_dump(mode="json")
    assert len(stages.prompts(m, EXAMPLES, "train").rows[1][0].steps) == 2


@pytest.mark.parametrize("where", ["turn_end", "step_mean"])
def test_the_losses_of_the_assistant_mode_by_hand(where):
    m = model("assistant", gold_steps="visible", focus_positions=where).train()
    b = batch(m)
    h = m.assistant(b.assistant, attention_mask=b.assistant_valid.long(), output_hidden_states=True).hidden_states[-1]
    z, rows = m.parts.generator.projection(h), torch.arange(2)
    steps = torch.zeros(2, b.step_spans.shape[1], 32)
    for row, step in b.has_step.nonzero().tolist():
        start, stop = b.step_spans[row, step].tolist()
        steps[row, step] = z[row, stop] if where == "turn_end" else z[row, start:stop].mean(0)
    answer = answer_vector(m.decoder.embed(b.answer), b.answer_valid)
    want = {"con": focus(z[rows, b.question], steps, b.has_step, answer), "kl": alignment(z[rows, b.question], z[rows[:, None], b.slots])}
    value, parts = loss(m, b)
    for name, expected in want.items():
        torch.testing.assert_close(parts[name], 0.33 * expected, atol=1e-5, rtol=1e-5)
    value.backward()
    assert m.parts.generator.projection.weight.grad.abs().max() > 0


def test_the_repaired_focus_loss_has_a_gradient_and_the_published_one_has_none(caplog):
    objective._warned.clear()
    sizes = {}
    for where in ("step_mean", "turn_end"):
        m = model(focus_positions=where, gold_steps="visible").train()
        _, parts = loss(m, batch(m))
        parts["con"].backward()
        sizes[where] = max(float(p.grad.abs().max()) for p in m.parts.parameters() if p.grad is not None)
    assert sizes["step_mean"] > 1e-4 and sizes["turn_end"] < 1e-6
    assert "no gradient" in caplog.text


@pytest.mark.parametrize("kind", ["block", "assistant", "static", "unknown", "none"])
def test_a_batch_answers_as_its_rows_do(kind):
    m = model(kind).eval()
    together = m.generate(EXAMPLES, samples=2, sampling=Sampling(temperature=1.0, top_k=20), max_new_tokens=6)
    alone = [
        m.generate([example], samples=2, first=i, sampling=Sampling(temperature=1.0, top_k=20), max_new_tokens=6)
        for i, example in enumerate(EXAMPLES)
    ]
    assert [row.ids for row in together.rows] == [row.ids for one in alone for row in one.rows]


def softcotpp():
    settings = LtaSettings.check(generator="assistant", num_thought_tokens=3, num_scaling_times=4, nce=True, gold_steps="off")
    torch.manual_seed(1)
    m = SoftcotModel.start(base(), TOKENIZERS["qwen3"], settings, assistant=base(5, 24))
    m.use_assistant(m.assistant, start_ids=[40, 41, 42, 43])
    return m


def test_sets_of_thoughts_are_those_of_whole_prompts_that_begin_with_their_vectors():
    m, table = softcotpp(), base(5, 24).get_input_embeddings().weight
    rows = batch(m, "test")
    made = m.make(rows).view(2, 4, 3, 32)
    for row in range(2):
        for number, start in enumerate([40, 41, 42, 43]):
            length = int(rows.assistant_valid[row].sum())
            x = table[rows.assistant[row, :length]].clone()
            x[rows.slots[row]] = table[start]
            h = m.assistant(inputs_embeds=x[None], output_hidden_states=True).hidden_states[-1][0]
            torch.testing.assert_close(made[row, number], m.parts.generator(h[rows.slots[row]]), atol=1e-5, rtol=1e-5)


def test_the_loss_of_sets_is_the_sum_of_theirs_and_the_initial_vectors_stay():
    m = softcotpp().train()
    rows = batch(m)
    value, parts = loss(m, rows)
    made = m.make(rows).view(2, 4, 3, 32)
    each = [plan_cross_entropy(m.decoder, rows.plan, read_with_thoughts(m.decoder, rows.plan, made[:, k])) for k in range(4)]
    torch.testing.assert_close(parts["sft"], sum(each), atol=1e-5, rtol=1e-5)
    value.backward()
    assert set(parts) == {"sft", "nce"} and not m.parts.starts.requires_grad
    assert m.parts.generator.projection.weight.grad.abs().max() > 0


def test_sets_of_thoughts_take_turns_in_the_samples_of_a_question():
    m = softcotpp().eval()
    drawn = {"sampling": Sampling(temperature=1.0), "max_new_tokens": 5}
    whole = m.generate(EXAMPLES, samples=8, **drawn)
    assert [(row.question, row.sample) for row in whole.rows] == [(q, s) for q in range(2) for s in range(8)]
    few, rest = m.generate(EXAMPLES, samples=5, **drawn), m.generate(EXAMPLES, samples=3, skip=5, **drawn)
    by_place = {(row.question, row.sample): row.ids for row in (*few.rows, *rest.rows)}
    assert by_place == {(row.question, row.sample): row.ids for row in whole.rows}
    alone = m.generate(EXAMPLES[1:], samples=8, first=1, **drawn)
    assert [row.ids for row in alone.rows] == [row.ids for row in whole.rows[8:]]
    greedy = m.generate(EXAMPLES[:1], samples=8, **GREEDY)
    assert [row.ids for row in greedy.rows[:4]] == [row.ids for row in greedy.rows[4:]], "sample s and s + 4 read one set"


@pytest.mark.parametrize("batch", [64, 3])
def test_what_stands_before_sets_of_thoughts_is_read_once_for_all_of_them(batch, monkeypatch):
    m, read, inject = softcotpp().eval(), [], policy.inject
    how = {"samples": 4, "sampling": Sampling(temperature=1.0), "max_new_tokens": 4, "batch": batch}
    shared = m.generate(EXAMPLES, **how)
    monkeypatch.setattr(policy, "inject", lambda *given: inject(*given[:-1]))
    apart = m.generate(EXAMPLES, **how)
    assert [row.ids for row in shared.rows] == [row.ids for row in apart.rows]
    monkeypatch.undo()
    step = type(m.decoder).__call__
    monkeypatch.setattr(type(m.decoder), "__call__", lambda own, x, *a, **o: read.append((own, x.shape)) or step(own, x, *a, **o))
    m.generate(EXAMPLES, **how | {"max_new_tokens": 1, "batch": 64})
    rows = [shape[0] for own, shape in read if own is m.decoder]
    assert rows[:2] == [2, 8], "two questions, then four sets of thoughts for each"


def test_adapters_on_base_and_assistant_start_as_nothing_learn_and_come_back(tmp_path):
    plain = model("assistant", gold_steps="off")
    tuned = model("assistant", gold_steps="off", tune_base_model=True, tune_assistant_model=True)
    tuned.parts.generator.load_state_dict(plain.parts.generator.state_dict())
    for m in (plain, tuned):
        m.eval()
    torch.testing.assert_close(loss(tuned, batch(tuned))[0], loss(plain, batch(plain))[0])
    value, _ = loss(tuned.train(), batch(tuned))
    value.backward()
    learning = {name for name, p in tuned.named_parameters() if p.grad is not None}
    assert all(name.startswith("parts.") for name in learning)
    assert any("base_lora.layers.0.q.B" in name for name in learning) and any("assistant_lora.layers.1.v.B" in name for name in learning)
    with torch.no_grad():
        for name, p in tuned.parts.named_parameters():
            p += 0.1 * torch.randn_like(p) if name.endswith(".B") else 0.0
    want = [row.ids for row in tuned.eval().generate(EXAMPLES, **GREEDY).rows]
    again = lab.load(tuned.save(tmp_path / "tuned"))
    again.use_assistant(base(5, 24))
    assert [row.ids for row in again.generate(EXAMPLES, **GREEDY).rows] == want
    assert want != [row.ids for row in plain.generate(EXAMPLES, **GREEDY).rows]
    with pytest.raises(SettingsError, match="needs generator: assistant"):
        model("block", tune_assistant_model=True)


PEFT = {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]}


def test_tuned_models_are_written_as_peft_holds_them_and_come_back(tmp_path):
    from peft import LoraConfig, get_peft_model

    m = model("assistant", gold_steps="off", tune_base_model=True, tune_assistant_model=True).eval()
    with torch.no_grad():
        for name, p in m.parts.named_parameters():
            p += 0.1 * torch.randn_like(p) if name.endswith(".B") else 0.0
    export_official(m, tmp_path)
    ids = torch.arange(10, 20)[None]
    for name, plain, decoder in (("base", base(), m.decoder), ("assistant", base(5, 24), m.assistant_decoder)):
        theirs = get_peft_model(plain, LoraConfig(**PEFT)).eval()
        theirs.load_state_dict(torch.load(tmp_path / f"{name}_model.bin", weights_only=True))
        with torch.no_grad():
            h = decoder(decoder.embed(ids), torch.arange(10)[None], decoder.grow()).last
            torch.testing.assert_close(theirs(ids).logits, decoder.logits(h), atol=1e-4, rtol=1e-4)
    answers = {"tokenizer": m.tokenizer, "num_thought_tokens": 3, "family": "qwen3", "distinct_slots": True}
    again = lab.load(tmp_path, backbone=base(), assistant=base(5, 24), **answers)
    assert [row.ids for row in again.generate(EXAMPLES, **GREEDY).rows] == [row.ids for row in m.generate(EXAMPLES, **GREEDY).rows]
    m.assistant = None
    with pytest.raises(SettingsError, match="call use_assistant first"):
        export_official(m, tmp_path / "again")


def test_published_weights_of_a_tuned_base_are_added_to_it(tmp_path):
    from peft import LoraConfig, get_peft_model

    m = model("block").eval()
    export_official(m, tmp_path / "official")
    wrapped = get_peft_model(base(), LoraConfig(**PEFT, init_lora_weights=False))
    torch.save(wrapped.state_dict(), tmp_path / "official" / "base_model.bin")
    again = lab.load(tmp_path / "official", backbone=base(), tokenizer=m.tokenizer, num_thought_tokens=3, family="qwen3")
    ids = torch.arange(10, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(again.backbone(ids).logits, wrapped(ids).logits, atol=1e-4, rtol=1e-4)
        assert (again.backbone(ids).logits - base()(ids).logits).abs().max() > 1e-2


def test_a_model_trained_with_other_words_is_refused_unless_it_is_wanted(tmp_path):
    other = Pack({**own_pack().wordings, "*/*/*": {**own_pack().wordings["*/*/*"], "lead": "Here: {slots}"}})
    torch.manual_seed(1)
    settings = LtaSettings.check(num_thought_tokens=3, inner=48)
    m = ThoughtModel.start(base(), TOKENIZERS["qwen3"], settings, pack=other)
    folder, words = m.save(tmp_path / "model"), tmp_path / "words.json"
    words.write_text(json.dumps(other.wordings))
    with pytest.raises(CheckpointError, match=f"trained with prompt wording {other.hash}.*pack='any'"):
        lab.load(folder)
    want = [row.ids for row in m.eval().generate(EXAMPLES, **GREEDY).rows]
    assert [row.ids for row in lab.load(folder, pack=str(words)).generate(EXAMPLES, **GREEDY).rows] == want
    assert lab.load(folder, pack="any").pack.hash == own_pack().hash
    with pytest.raises(SettingsError, match="says everything itself"):
        lab.load(folder, backbone="toy:qwen3")
    words.write_text('{"*/*/*": {"leed": "x"}}')
    with pytest.raises(DataError, match="Unknown text of a prompt pack 'leed'. Did you mean 'lead'"):
        lab.load(folder, pack=str(words))
    with pytest.raises(DataError, match="cannot be read as a prompt pack"):
        lab.load(folder, pack=str(tmp_path / "absent.json"))


def test_thought_counts_that_make_no_sense_are_refused():
    with pytest.raises(SettingsError, match="no thoughts for generator 'block'.*from 1 on"):
        LtaSettings.check(num_thought_tokens=0)
    with pytest.raises(SettingsError, match="train_thoughts holds 5; give numbers from 1 to num_thought_tokens = 3"):
        LtaSettings.check(num_thought_tokens=3, train_thoughts=[1, 5])
    assert LtaSettings.check(generator="none", num_thought_tokens=0).counts == [0]


def test_info_nce_by_hand():
    sets = torch.eye(3)[None]
    keep = torch.full((1, 3, 3), 2.0)
    want = -torch.log_softmax(20 * torch.eye(3), -1).diagonal().mean() / 3
    torch.testing.assert_close(info_nce(sets, keep), want)


@pytest.mark.parametrize("kind", ["block", "assistant"])
def test_files_round_trip(kind, tmp_path):
    m = model(kind, SoftcotModel if kind == "assistant" else ThoughtModel).eval()
    want = [row.ids for row in m.generate(EXAMPLES, **GREEDY).rows]
    m.backbone.save_pretrained(tmp_path / "base")
    export_official(m, tmp_path / "official")
    answers = {"backbone": m.backbone, "tokenizer": m.tokenizer, "num_thought_tokens": 3, "family": "qwen3"}
    if kind == "assistant":
        answers |= {"assistant": m.assistant, "distinct_slots": True}
    again = lab.load(tmp_path / "official", **answers)
    assert again.method == ("lta" if kind == "block" else "softcot")
    assert [row.ids for row in again.generate(EXAMPLES, **GREEDY).rows] == want
    own = lab.load(m.save(tmp_path / "own"))
    own.use_assistant(m.assistant)
    assert [row.ids for row in own.generate(EXAMPLES, **GREEDY).rows] == want


def test_published_files_are_read_with_what_their_scripts_fixed(tmp_path):
    export_official(model("block"), tmp_path / "lta")
    export_official(model("assistant", SoftcotModel), tmp_path / "softcot")
    answers = {"backbone": base(), "tokenizer": TOKENIZERS["qwen3"], "num_thought_tokens": 3, "family": "qwen3"}
    assert lab.load(tmp_path / "lta", **answers).config.distinct_slots
    assert lab.load(tmp_path / "lta" / "projection.bin", **answers).method == "lta", "the block beside it belongs to it"
    assert not lab.load(tmp_path / "lta", **answers, task="strategyqa").config.distinct_slots
    soft = lab.load(tmp_path / "softcot", **answers, assistant=base(5, 24))
    placeholder = TOKENIZERS["qwen3"].convert_tokens_to_ids("<|endoftext|>")
    row = prompted(soft, EXAMPLES[0])
    assert {row.assistant[slot] for slot in row.slots} == {placeholder}, "SoftCoT's thoughts share the placeholder's id"
    for family, eps in (("qwen3", 1e-6), ("llama", 1e-5)):
        block = lab.load(tmp_path / "lta", **answers | {"family": family}).parts.generator.block
        assert block.norm1.eps == block.norm2.eps == eps
    with pytest.raises(SettingsError, match="prompt family"):
        lab.load(tmp_path / "lta", **answers | {"family": "mistral"})


@pytest.mark.parametrize(
    ("method", "task", "distinct"), [("lta", "gsm8k", True), ("lta", "strategyqa", False), ("softcot", "gsm8k", False)]
)
def test_an_evaluation_of_a_projection_alone_reads_it_as_its_method_made_it(method, task, distinct, tmp_path):
    m = model("assistant", SoftcotModel)
    export_official(m, tmp_path / "official")
    for name, part in (("qwen3-large", m.backbone), ("qwen3-small", m.assistant)):
        part.save_pretrained(tmp_path / name)
        m.tokenizer.save_pretrained(tmp_path / name)
    values = {"large_model_id": str(tmp_path / "qwen3-large"), "small_model_id": str(tmp_path / "qwen3-small"), "pack": ""}
    values |= {"params_file_name": str(tmp_path / "official" / "projection.bin"), "task_name": task, "method": method}
    assert stages.trained(tmp_path, values).config.distinct_slots is distinct


def test_softcot_draws_at_temperature_one_where_nothing_is_said(tmp_path):
    m = model("assistant", SoftcotModel).eval()
    options = {"samples": 4, "max_new_tokens": 6}
    for top_k, want in ((None, 50), (3, 3)):
        m.backbone.generation_config.top_k = top_k
        unsaid = m.generate(EXAMPLES, **options)
        said = m.generate(EXAMPLES, **options, sampling=Sampling(temperature=1.0, top_k=want))
        assert [row.ids for row in unsaid.rows] == [row.ids for row in said.rows]


def test_files_that_lack_something_say_so(tmp_path):
    m = model("block")
    export_official(m, tmp_path / "official")
    (tmp_path / "official" / "TransformerBlock.bin").unlink()
    with pytest.raises(CheckpointError, match="TransformerBlock"):
        lab.load(tmp_path / "official", backbone=m.backbone, tokenizer=m.tokenizer, family="qwen3")
    with pytest.raises(SettingsError, match="backbone="):
        lab.load(tmp_path / "official")
    with pytest.raises(CheckpointError, match="width"):
        lab.load(tmp_path / "official", backbone=base(hidden=16), family="qwen3")
    with pytest.raises(SettingsError, match="small model"):
        ThoughtModel.start(base(), TOKENIZERS["qwen3"], LtaSettings.check(generator="assistant"))


def test_each_thought_is_left_out_once_and_a_static_one_carries_nothing_of_the_question():
    frozen = load_backbone("toy:qwen3", vocab_size=len(toy.WORLD.vocabulary), initializer_range=0.2, **toy.SIZES)
    models = {arm: toy.start(arm, frozen, 0, 2).eval() for arm in ("static", "lta")}
    asked = toy.questions(toy.WORLD.task(12, np.random.default_rng(0)), 2, solution=False)
    rows = {arm: ablate(of_hidden_instructions(m, asked), interventions=(), each=2) for arm, m in models.items()}
    assert all([row["intervention"] for row in of] == ["as they are", "without thought 1", "without thought 2"] for of in rows.values())
    assert rows["static"][-1]["changed"] == 0 < rows["lta"][-1]["changed"]
