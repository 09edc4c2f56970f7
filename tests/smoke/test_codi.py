"""CODI's invariants on GPT-2 and Llama, its files, and its bad input."""

import json
import logging
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lab.data.examples import Example
from lab.errors import CheckpointError, DataError, SettingsError
from lab.latent.distill import distance, distillation, scale_of
from lab.latent.plan import collate_pairs
from lab.methods.codi.checkpoint import export_official
from lab.methods.codi.config import CodiSettings
from lab.methods.codi.data import pair, prepare
from lab.methods.codi.model import CodiModel
from lab.methods.codi.objective import counts, loss, run
from lab.methods.codi.policy import generate
from lab.models.backbones import load_backbone
from lab.models.layouts import load
from lab.models.tokenizers import byte_tokenizer, load_tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures" / "codi"
SMALL = dict(prj_dim=48, lora_r=0, num_latent=3)


def llama_config():
    from transformers import LlamaConfig

    return LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)


def open_fixture(family: str, **answers) -> CodiModel:
    known = dict(heads=2) if family == "gpt2" else dict(config=llama_config())
    tokenizer = str(FIXTURES / f"tok_{family}")
    return load(FIXTURES / f"{family}_state_dict.safetensors", lora_alpha=8, num_latent=3, tokenizer=tokenizer, **known, **answers)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request) -> CodiModel:
    return open_fixture(request.param)


QUESTIONS = ["Tom has 5 apples and buys 7 more then eats 2. How many?", "How many?", "Sam has 9 apples and buys 90 more. How many?"] * 2


def test_ragged_batch_equals_single_questions(model: CodiModel):
    together = generate(model, QUESTIONS, max_new_tokens=12, vectors=True, top=3)
    for index, question in enumerate(QUESTIONS):
        alone = generate(model, [question], max_new_tokens=12, vectors=True, top=3)
        assert alone.rows[0].ids == together.rows[index].ids
        torch.testing.assert_close(alone.vectors[0], together.vectors[index], atol=2e-5, rtol=2e-5)
        assert alone.rows[0].top[0][0] == together.rows[index].top[0][0]


def test_generation_equals_the_plain_recomputation(model: CodiModel):
    """No cache, no batch, transformers' own forward: the definition, once."""
    prompt = model.prompt(QUESTIONS[0])
    x = model.backbone.get_input_embeddings()(torch.tensor([prompt]))
    with torch.no_grad():
        for _ in range(3):
            h = model.backbone(inputs_embeds=x, output_hidden_states=True).hidden_states[-1][:, -1:]
            x = torch.cat((x, model.parts.prj(h)), 1)
        x = torch.cat((x, model.backbone.get_input_embeddings()(torch.tensor([[model.config.eot_id]]))), 1)
        said = []
        for _ in range(8):
            logits = model.backbone(inputs_embeds=x).logits[0, -1]
            logits[[model.config.pad_id, model.config.bot_id, model.config.eot_id]] = -torch.inf
            said.append(int(logits.argmax()))
            x = torch.cat((x, model.backbone.get_input_embeddings()(torch.tensor([said[-1:]]))), 1)
    ours = generate(model, [QUESTIONS[0]], max_new_tokens=8).rows[0].ids
    assert ours == said[: len(ours)] and (len(ours) == 8 or said[len(ours)] == model.config.eos_id)


def rows(model: CodiModel, seed: int = 0, count: int = 5, equal: bool = False) -> list:
    draw = random.Random(seed)

    def ids(n: int) -> list[int]:
        return [draw.randrange(5, 300) for _ in range(n)]

    return [pair(ids(7 if equal else 3 + 2 * i), ids(4 if equal else i), ids(5 if equal else 3 + i), 1, model.config) for i in range(count)]


def test_padded_losses_and_gradients_equal_single_rows(model: CodiModel):
    batch = rows(model)
    model.zero_grad()
    value, parts = loss(model, collate_pairs(batch))
    (parts["ce"] + parts["ref_ce"]).backward()
    padded = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    total = {"ce": 0.0, "ref_ce": 0.0}
    whole = counts(collate_pairs(batch))
    for row in batch:
        single = collate_pairs([row])
        _, alone = loss(model, single)
        for name in total:
            share = alone[name] * counts(single)[name] / whole[name]
            share.backward(retain_graph=True)
            total[name] += share.item()
    for name in total:
        assert total[name] == pytest.approx(parts[name].item(), rel=1e-5)
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, padded[name], atol=2e-5, rtol=2e-4)
    model.zero_grad()


def test_right_masks_equal_the_official_ones_without_padding(model: CodiModel):
    batch = collate_pairs(rows(model, equal=True), pad=model.config.pad_id)
    ours = loss(model, batch)[0].item()
    official = CodiModel(model.backbone, None, model.config.but(compat="codi"), model.parts)
    assert loss(official, batch)[0].item() == pytest.approx(ours, rel=1e-5)
    ragged = collate_pairs(rows(model), pad=model.config.pad_id)
    assert loss(official, ragged)[0].item() != pytest.approx(loss(model, ragged)[0].item(), rel=1e-5)


def test_question_is_read_once(model: CodiModel, monkeypatch):
    widths = []
    decoder = model.decoder

    class Counting:
        def __getattr__(self, name):
            return getattr(decoder, name)

        def __call__(self, x, *args, **kwargs):
            widths.append(x.shape[1])
            return decoder(x, *args, **kwargs)

    monkeypatch.setitem(model.__dict__, "decoder", Counting())
    batch = collate_pairs(rows(model, equal=True))
    run(model, batch)
    teacher, spoken = batch.teacher.after.ids.shape[1], batch.student.after.ids.shape[1]
    assert widths == [7, teacher, 1, 1, 1, 1 + spoken]  # question, teacher, begin token, thoughts, last thought with the answer


@pytest.mark.parametrize("teacher_pass", ["shared", "separate"])
def test_target_is_never_learned_through_the_distillation(teacher_pass: str):
    model = fresh(teacher_pass=teacher_pass, ref_loss_factor=0.0)
    batch = collate_pairs(rows(model))
    _, parts = loss(model, batch)
    done = run(model, batch)
    assert parts["distill"].requires_grad
    grads = torch.autograd.grad(parts["distill"], [done.teacher.after], allow_unused=True)
    assert grads == (None,)


def test_separate_teacher_equals_the_shared_one_without_dropout():
    shared, separate = (fresh(teacher_pass=how) for how in ("shared", "separate"))
    batch = collate_pairs(rows(shared))
    assert loss(shared, batch)[0].item() == pytest.approx(loss(separate, batch)[0].item(), rel=1e-6)


def fresh(arch: str = "gpt2", **settings) -> CodiModel:
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    backbone = load_backbone(f"toy:{arch}-micro", vocab_size=320)
    return CodiModel.start(backbone, tokenizer, CodiSettings(**{**SMALL, **settings})).eval()


@pytest.mark.parametrize("count", [0, 1, 5])
def test_any_number_of_thoughts(count: int):
    model = fresh(num_latent=count)
    value, _ = loss(model, collate_pairs(rows(model)))
    assert torch.isfinite(value)
    found = generate(model, ["1+1?"], max_new_tokens=3)
    assert found.rows[0].thoughts == count
    assert generate(model, ["1+1?"], thoughts=count + 2, max_new_tokens=3).rows[0].thoughts == count + 2


@pytest.mark.parametrize("arch", ["gpt2", "llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("rank", [0, 4])
def test_it_learns_on_every_backbone(arch: str, rank: int):
    model = fresh(arch, lora_r=rank, lora_dropout=0.0)
    batch = collate_pairs(rows(model))
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-2)
    losses = []
    model.train()
    for _ in range(12):
        value, _ = loss(model, batch)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < (0.97 if rank else 0.8) * losses[0]
    if rank:
        assert model.parts.marks.grad.abs().max() > 0  # the two marks learn although the embedding is frozen
        assert sum(p.numel() for p in learning) < 0.7 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("rank", [0, 4])
def test_saved_model_is_the_same(rank: int, tmp_path: Path):
    model = fresh("llama", lora_r=rank)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    want = generate(model, ["2+3?", "and 4+4+4?"], max_new_tokens=6, vectors=True)
    model.save(tmp_path / "model")
    again = load(tmp_path / "model")
    found = generate(again, ["2+3?", "and 4+4+4?"], max_new_tokens=6, vectors=True)
    assert [row.ids for row in found.rows] == [row.ids for row in want.rows]
    torch.testing.assert_close(torch.stack(found.vectors), torch.stack(want.vectors), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("keep", [True, False])
def test_official_layout_round_trip(family: str, keep: bool, tmp_path: Path):
    model = open_fixture(family, keep_lora=keep)
    path = export_official(model, tmp_path / "model.safetensors")
    official = load_file(FIXTURES / f"{family}_state_dict.safetensors")
    written = load_file(path)
    assert set(written) == set(official)
    assert all(written[key].shape == official[key].shape for key in official)
    if keep:
        assert all(torch.equal(written[key], official[key].float()) for key in official)
    known = dict(heads=2) if family == "gpt2" else dict(config=llama_config())
    again = load(path, lora_alpha=8, num_latent=3, tokenizer=str(FIXTURES / f"tok_{family}"), **known)
    want, found = (generate(m, QUESTIONS[:2], max_new_tokens=6) for m in (model, again))
    assert [row.ids for row in want.rows] == [row.ids for row in found.rows]


def test_older_prefix_and_folded_lora(tmp_path: Path):
    official = load_file(FIXTURES / "gpt2_state_dict.safetensors")
    older = {key.replace("codi.", "coconut.", 1): value for key, value in official.items()}
    save_file(older, tmp_path / "model.safetensors")
    model = load(tmp_path, lora_alpha=8, num_latent=3, heads=2, tokenizer=str(FIXTURES / "tok_gpt2"))
    want, found = (generate(m, QUESTIONS[:2], max_new_tokens=6) for m in (open_fixture("gpt2"), model))
    assert model.method == "codi" and [row.ids for row in want.rows] == [row.ids for row in found.rows]


def test_what_a_file_does_not_say_is_asked_for(tmp_path: Path, caplog):
    path = FIXTURES / "gpt2_state_dict.safetensors"
    with pytest.raises(SettingsError, match="heads"):
        load(path, lora_alpha=8)
    with pytest.raises(SettingsError, match="backbone="):
        load(FIXTURES / "llama_state_dict.safetensors", lora_alpha=8)
    with pytest.raises(SettingsError, match="Did you mean 'lora_alpha'"):
        load(path, lora_alfa=8)
    with caplog.at_level(logging.WARNING):
        load(path, heads=2)
    assert "LoRA alpha" in caplog.text
    broken = load_file(path)
    broken.pop("prj.ln.bias")
    save_file(broken, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="ln.bias"):
        load(tmp_path, lora_alpha=8, heads=2)


def test_released_latent_tts_folder(tmp_path: Path):
    config = json.loads((FIXTURES.parent / "latenttts" / "codi_config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    state = load_file(FIXTURES.parent / "latenttts" / "codi_state.safetensors")
    save_file(state, tmp_path / "model.safetensors")
    model = load(tmp_path, num_latent=4)
    assert model.method == "codi" and model.config.prj_dim == 48 and model.config.bot_id == 61
    torch.testing.assert_close(model.parts.prj.ln.weight, state["projector.4.weight"])
    assert generate(model, [[3, 4, 5, 61]], max_new_tokens=4).rows[0].thoughts == 4
    model = load(tmp_path, tokenizer=str(FIXTURES / "tok_gpt2"))
    assert model.prompt(" Tom has  5. ") == [*model.tokenizer(" Tom has  5. ").input_ids, 61], (
        "the released scripts read questions as they are"
    )


def test_the_models_own_forward_gives_the_same_answers_but_cannot_show_pads(model: CodiModel):
    other = open_fixture(model.backbone.config.model_type, forward="transformers")
    ours, theirs = (generate(one, QUESTIONS[:3], max_new_tokens=8) for one in (model, other))
    assert [row.ids for row in ours.rows] == [row.ids for row in theirs.rows]
    with pytest.raises(SettingsError, match="forward='own'"):
        generate(open_fixture("gpt2", compat="codi", forward="transformers"), QUESTIONS[:2], max_new_tokens=2)


def test_unusable_examples_are_dropped_counted_and_named():
    tokenizer = load_tokenizer(str(FIXTURES / "tok_gpt2"))
    s = CodiSettings(eos_id=0, bot_id=1, eot_id=2, max_token_num=100)
    good = Example("good", "Tom has 5 apples.", ("<<5+1=6>>", "<<6+1=7>>"), "7")
    bad = [
        Example("negative", "Q?", ("<<1-2=-1>>",), "-1"),
        Example("infinite", "Q?", ("<<1/0=inf>>",), "inf"),
        Example("empty", "Q?", ("<<1=1>>",), " "),
        Example("twice", "Q? The answer is: 3", ("<<1=1>>",), "1"),
        Example("long", "Q? " * 200, ("<<1=1>>",), "1"),
    ]
    kept = prepare([good, *bad], tokenizer, s)
    assert kept.ids == ["good"] and sorted(sum(kept.dropped.values(), [])) == sorted(example.id for example in bad)
    assert "5 of 6" in kept.note()
    one_step = prepare([Example("one", "Q?", ("<<1+1=2>>",), "2")], tokenizer, s).rows[0]  # its CoT is empty without the last step
    assert tokenizer.decode(one_step[0].after).startswith("The answer is: 2")
    with pytest.raises(DataError, match="No example can be used"):
        prepare(bad, tokenizer, s)


def test_long_pieces_are_dropped_by_default_and_cut_under_compat():
    tokenizer = load_tokenizer(str(FIXTURES / "tok_gpt2"))
    example = Example("a", "word " * 100, ("<<1+1=2>>",), "2")
    s = CodiSettings(eos_id=0, bot_id=1, eot_id=2)
    with pytest.raises(DataError, match="256"):
        prepare([example], tokenizer, s)
    assert len(prepare([example], tokenizer, s.but(compat="codi")).rows[0][0].prompt) == 256


def test_contradictions_are_refused():
    with pytest.raises(SettingsError, match="fix_attn_mask"):
        CodiSettings.check(fix_attn_mask=True)
    with pytest.raises(SettingsError, match="num_latents"):
        CodiSettings.check(num_latents=3)
    with pytest.raises(SettingsError, match="0 or more"):
        generate(fresh(), ["1?"], thoughts=-1)


def test_distances_and_scales():
    draw = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 4, 5, generator=draw) for _ in range(2))
    assert distance(student, teacher, "mse")[1].item() == pytest.approx((student[1] - teacher[1]).pow(2).mean().item(), rel=1e-6)
    assert scale_of(teacher, "layerwise_std")[2].item() == pytest.approx(teacher[2].flatten().std().item(), rel=1e-6)
    assert distillation(teacher, teacher).item() == 0
    with pytest.raises(SettingsError, match="smooth_l1"):
        distance(student, teacher, "smooth_l2")
    assert CodiSettings(distill_loss_factor=20.0).effective_weight(16) == pytest.approx(20 / 17)


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_half_precision(arch: str):
    """Under autocast, and with a backbone in bfloat16 beside the float32 projection, which the official code cannot do."""
    model = fresh(arch)
    batch = collate_pairs(rows(model))
    want = loss(model, batch)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, _ = loss(model, batch)
    value.backward()
    assert value.item() == pytest.approx(want.item(), rel=0.02)
    model.backbone.to(torch.bfloat16)
    assert model.parts.prj[1].weight.dtype == torch.float32
    assert generate(model, ["1+1?", "and 22+1?"], max_new_tokens=3).rows[1].thoughts == 3


def test_written_answers_come_from_the_same_weights():
    model = fresh()
    written = generate(model, ["1+1?"], max_new_tokens=4, written=True).rows[0]
    assert written.thoughts == 0 and written.prompt == generate(model, ["1+1?"], max_new_tokens=1).rows[0].prompt[:-1]


@pytest.mark.parametrize("arm", ["codi", "no_distillation", "no_cot", "cot"])
def test_arms_train_validate_and_stop(arm: str, tmp_path: Path):
    from lab.methods.codi.train import arm_settings, train
    from lab.train import TrainSettings

    tokenizer = byte_tokenizer()
    model = CodiModel.start(load_backbone("toy:gpt2-micro", vocab_size=320), tokenizer, arm_settings(arm, CodiSettings(**SMALL)))
    examples = [Example(str(i), f"{i}+1?", (f"<<{i}+1={i + 1}>>", "<<1=1>>"), str(i + 1)) for i in range(8)]
    kept = prepare(examples, tokenizer, model.config).rows
    log = []
    how = TrainSettings(steps=3, global_batch=4, micro_batch=2, lr=1e-3, save_every=0, eval_every=2, log_every=1)
    found = train(model, kept, how, tmp_path, lambda **row: log.append(row), arm=arm, held_out=kept[:3])
    assert found.steps == 3 and all(0 <= row["eval_score"] <= 1 for row in log if "eval_score" in row)
    last = [row for row in log if "loss" in row][-1]
    assert ("distill" in last) == (arm in ("codi", "no_distillation")) and ("ce" in last) == (arm != "cot")


@pytest.mark.parametrize("kind", ["smooth_l1", "l2"])
def test_training_does_not_depend_on_the_micro_batch(tmp_path: Path, kind: str):
    """The deviation that scales the distances is the whole batch's; the official code takes each micro-batch's own."""
    ours = [_trained(tmp_path / f"ours-{micro}", micro, distill_loss_type=kind) for micro in (1, 2, 4)]
    for weights in ours[1:]:
        torch.testing.assert_close(weights, ours[0], atol=4e-5, rtol=1e-4)
    official = [_trained(tmp_path / f"official-{micro}", micro, distill_loss_type=kind, compat="codi") for micro in (2, 4)]
    assert (official[0] - official[1]).abs().max() > 1e-4


@pytest.mark.parametrize("compat", ["", "codi"])
def test_the_logged_loss_is_the_mean_of_the_micro_batches_under_compat_alone(tmp_path: Path, compat: str):
    from lab.methods.codi.train import train
    from lab.train import TrainSettings

    model, log = fresh(compat=compat, distill_loss_factor=0.0), []
    ragged = sorted(rows(model, count=4), key=lambda pair: len(pair[0]) + len(pair[1]))
    parts = [collate_pairs(ragged[i : i + 2], pad=model.config.pad_id) for i in (0, 2)]
    with torch.no_grad():
        found = [loss(model, part)[1] for part in parts]
    assert parts[0].teacher.labelled != parts[1].teacher.labelled
    how = TrainSettings(steps=1, global_batch=4, micro_batch=2, order="as_given", save_every=0, log_every=1)
    train(model, ragged, how, tmp_path, lambda **row: log.append(row))
    for name, side in (("ce", "student"), ("ref_ce", "teacher")):
        weights = [2.0 if compat else getattr(part, side).labelled for part in parts]
        mean = sum(weight * float(part[name]) for weight, part in zip(weights, found, strict=True)) / sum(weights)
        assert log[0][name] == pytest.approx(mean, rel=1e-5)


def _trained(folder: Path, micro: int, **settings) -> torch.Tensor:
    from lab.methods.codi.train import train
    from lab.train import TrainSettings

    model = fresh(**settings)
    how = TrainSettings(steps=2, global_batch=4, micro_batch=micro, lr=1e-3, save_every=0)
    train(model, rows(model, count=8), how, folder)
    return torch.cat([p.detach().flatten() for p in model.parameters()])
