"""Think-at-Hard against the numbers of its official code (tests/fixtures/tah): forward, losses, gradients, decider, checkpoints."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lab.models.layouts as layouts
from lab.errors import CheckpointError, SettingsError
from lab.methods.tah.checkpoint import save_official
from lab.methods.tah.config import MLPSettings, TahConfig, read_config
from lab.methods.tah.deciders import MLPDecider, Seen
from lab.methods.tah.model import TahModel, freeze
from lab.models.vocab import soft_embedding, soft_embedding_of

FOLDER = Path(__file__).parents[1] / "fixtures" / "tah"
CHECKPOINT = FOLDER / "checkpoint_official_layout"
INPUTS, OUTPUTS = load_file(FOLDER / "model_inputs.safetensors"), load_file(FOLDER / "model_outputs.safetensors")
META = json.loads((FOLDER / "model_meta.json").read_text())
IDS, MASK, LABELS, COUNTS = (INPUTS[name] for name in ("input_ids", "attention_mask", "labels", "iter_count_labels"))
VALID = MASK.bool()
LOGITS, GRADIENTS = {"atol": 2e-4, "rtol": 0}, {"atol": 1e-5, "rtol": 1e-3}


def official(dtype: str = "auto", **changes) -> TahModel:
    return layouts.load(CHECKPOINT, dtype=dtype, **changes)


def gradient_norm(model: TahModel) -> float:
    return sum(float((p.grad**2).sum()) for p in model.parameters() if p.grad is not None) ** 0.5


@pytest.fixture
def step1() -> TahModel:
    base = official()
    model = base.reconfigure(iter_decider="IterLabelDecider", iter_decider_kwargs={}, train_loss="NextTokenPredLoss", train_loss_kwargs={})
    return model.train()


def test_a_single_pass_is_the_plain_backbone(step1):
    with torch.no_grad():
        out = step1.eval()(IDS, MASK, return_logits=True)
        plain = step1.backbone(input_ids=IDS, attention_mask=MASK).logits
    torch.testing.assert_close(out.logits[VALID], OUTPUTS["single_pass.logits"][VALID], **LOGITS)
    torch.testing.assert_close(out.logits[VALID], plain[VALID], **LOGITS)
    assert torch.equal(out.iterations, OUTPUTS["single_pass.iter_count"])


def test_step_one_loss_logits_and_gradients(step1):
    out = step1(IDS, MASK, LABELS, COUNTS, return_logits=True)
    out.loss.backward()
    torch.testing.assert_close(out.loss.detach(), OUTPUTS["step1.loss"][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(out.logits[VALID], OUTPUTS["step1.logits"][VALID], **LOGITS)
    assert torch.equal(out.iterations, OUTPUTS["step1.iter_count"])
    assert torch.equal(out.iter_count_labels, OUTPUTS["step1.iter_count_labels_out"])
    lora = {key.removeprefix("base_model.model."): p for key, p in step1.lora._peft_items()}
    weights = {**dict(step1.backbone.named_parameters()), **lora}
    for key in (key for key in OUTPUTS if key.startswith("step1.grad.")):
        torch.testing.assert_close(weights[key.removeprefix("step1.grad.")].grad, OUTPUTS[key], **GRADIENTS)
    norm, count = META["step1"]["grad_global_norm, n_params_with_grad"]
    assert gradient_norm(step1) == pytest.approx(norm, rel=1e-4)
    assert sum(p.grad is not None for p in step1.parameters()) == count


@pytest.mark.parametrize(("changes", "items", "key"), [({}, 40, "with num_items_in_batch=40"), ({"max_iter": 3}, None, "step1_max_iter3")])
def test_gradient_norms_with_num_items_and_three_passes(step1, changes, items, key):
    wanted = META["step1"][key] if key in META["step1"] else META[key]
    model = step1.reconfigure(**changes).train()
    counts = INPUTS["iter_count_labels_max3"] if changes else COUNTS
    model(IDS, MASK, LABELS, counts, num_items_in_batch=items).loss.backward()
    assert gradient_norm(model) == pytest.approx(wanted[0], rel=1e-4)


def test_the_official_directory_reproduces_the_decider_run():
    with torch.no_grad():
        out = official()(IDS, MASK, return_logits=True)
    torch.testing.assert_close(out.logits[VALID], OUTPUTS["mlp_eval.logits"][VALID], **LOGITS)
    assert torch.equal(out.iterations, OUTPUTS["mlp_eval.iter_count"])
    torch.testing.assert_close(out.decider_logit[VALID], OUTPUTS["mlp_eval.decider_logits_depth1"], **LOGITS)
    assert torch.equal(out.again[VALID], OUTPUTS["mlp_eval.decision_depth1"].bool())


@pytest.mark.parametrize(("items", "divisor"), [(None, 28), (17, 17)])
def test_step_two_official_scaling_and_gradients(items, divisor):
    model = official(train_loss_kwargs={"pos_weight": 5.4, "loss_scaling": "official"}).train()
    left = freeze(model, ["model.simple_base_model"])
    out = model(IDS, MASK, LABELS, COUNTS, num_items_in_batch=items)
    out.loss.backward()
    torch.testing.assert_close(out.loss.detach() * divisor, OUTPUTS["step2.loss"][0] * 28, rtol=1e-5, atol=0)
    assert torch.equal(out.iterations, OUTPUTS["step2.iter_count"])
    assert all(name.startswith("parts.decider") for name in left) and model.decider.threshold.grad is None
    for name, parameter in model.decider.named_parameters():
        if name != "threshold":
            torch.testing.assert_close(parameter.grad * divisor / 28, OUTPUTS[f"step2.grad.{name}"], **GRADIENTS)
    assert not any(p.requires_grad for p in model.lora.parameters()), "a frozen adapter stays frozen through a forward"


def test_step_two_default_scaling_is_the_mean_over_decisions():
    model = official(train_loss_kwargs={"pos_weight": 5.4}).train()
    loss = model(IDS, MASK, LABELS, COUNTS, num_items_in_batch=17).loss
    torch.testing.assert_close(loss.detach(), OUTPUTS["step2.loss"][0] * 28, rtol=1e-5, atol=0)


def test_soft_embeddings_clip_and_agree_with_the_version_without_logits():
    logits, weight = INPUTS["softembed.logits"], INPUTS["softembed.weight"]
    torch.testing.assert_close(soft_embedding(logits, weight, 12), OUTPUTS["softembed.topk12"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(soft_embedding(logits, weight, 200), logits.softmax(-1) @ weight, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(soft_embedding(logits, weight, 1), weight[logits.argmax(-1)])
    h, head = torch.randn(5, 32, requires_grad=True), torch.randn(96, 32, requires_grad=True)
    for topk in (1, 12, 96):
        ours, plain = soft_embedding_of(h, head, weight, topk), soft_embedding(h @ head.T, weight, topk)
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
        for mine, theirs in zip(torch.autograd.grad(ours.sum(), (h, head)), torch.autograd.grad(plain.sum(), (h, head)), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_the_stand_alone_decider():
    state = {key.removeprefix("decider_norm0.sd."): value for key, value in OUTPUTS.items() if key.startswith("decider_norm0.sd.")}
    kwargs = official().tah.iter_decider_kwargs
    decider = MLPDecider(MLPSettings.check(**kwargs)).eval()
    decider.load_state_dict(state)
    logits, hidden = OUTPUTS["decider_norm0.logits"], OUTPUTS["decider_norm0.hidden"]
    for depth, states, key in ((1, hidden, "out"), (2, hidden, "out_at_max_iter"), (1, None, "out_no_hidden")):
        torch.testing.assert_close(decider.decide(logits, states, depth)[1].detach(), OUTPUTS[f"decider_norm0.{key}"], atol=1e-5, rtol=1e-5)


def test_normalised_decider_inputs_are_layer_norm_and_softmax():
    settings = MLPSettings.check(
        topk=4, hidden_states_size=3, hidden_states_layer_nums=[0, 1], hidden_dims=[5], dtype="float32", normalize_input=True
    )
    decider = MLPDecider(settings).eval()
    plain = MLPDecider(settings.but(normalize_input=False)).eval()
    plain.load_state_dict({key: value for key, value in decider.state_dict().items() if "layer_norm_hidden" not in key})
    top, hidden = torch.randn(6, 4), torch.randn(6, 2, 3)
    normal = torch.nn.functional.layer_norm(hidden.flatten(1), (6,)).view(6, 2, 3)
    expected = plain.logit(Seen(1, 6, top.softmax(-1), normal))
    torch.testing.assert_close(decider.logit(Seen(1, 6, top, hidden)), expected)


@pytest.mark.parametrize(("value", "kind"), [(v, k) for k in ("bfloat16", "float32") for v in (0.5, 0.8, 0.9, 0.95)])
def test_thresholds_are_rounded_to_the_deciders_type(value, kind):
    settings = MLPSettings.check(topk=2, hidden_states_size=2, hidden_states_layer_nums=[0], hidden_dims=[2], dtype=kind, threshold=value)
    wanted = META["bf16_thresholds"][str(value)] if kind == "bfloat16" else value
    assert MLPDecider(settings).effective_threshold == pytest.approx(wanted, abs=1e-7)


def test_saving_gives_the_official_layout_back(tmp_path):
    model = official()
    save_official(model, tmp_path / "again")
    layout = json.loads((FOLDER / "checkpoint_layout.json").read_text())
    assert json.loads((tmp_path / "again" / "tah_config.json").read_text()) == json.loads((CHECKPOINT / "tah_config.json").read_text())
    for name in ("model.safetensors", "lora/adapter_model.safetensors"):
        saved, wanted = load_file(tmp_path / "again" / name), load_file(CHECKPOINT / name)
        assert {key: list(value.shape) for key, value in saved.items()} == layout[name]
        assert all(torch.equal(saved[key], wanted[key]) for key in wanted)
    record = torch.load(tmp_path / "again" / "iter_decider.bin", weights_only=True)
    assert record["class"] == "MLPIterDecider" and set(record["init_args"]) == set(layout["iter_decider.bin"]["init_args"])
    assert {key: list(value.shape) for key, value in record["state_dict"].items()} == layout["iter_decider.bin"]["state_dict"]


def test_our_own_folder_keeps_everything_with_its_threshold(tmp_path):
    model = official(threshold=0.25)
    model.save(tmp_path / "own")
    again = layouts.load(tmp_path / "own")
    with torch.no_grad():
        first, second = model(IDS, MASK, return_logits=True), again(IDS, MASK, return_logits=True)
    assert torch.equal(first.logits, second.logits) and torch.equal(first.iterations, second.iterations)
    assert again.decider.effective_threshold == 0.25


def changed(tmp_path: Path, **values) -> Path:
    folder = tmp_path / "changed"
    folder.mkdir()
    for path in CHECKPOINT.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "tah_config.json").unlink()
    config = {**json.loads((CHECKPOINT / "tah_config.json").read_text()), **values}
    (folder / "tah_config.json").write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))
    return folder


def test_a_config_without_the_deciders_cap_loses_no_token(tmp_path):
    kwargs = json.loads((CHECKPOINT / "tah_config.json").read_text())["iter_decider_kwargs"]
    for cap in ("absent", 3):
        own = {key: value for key, value in {**kwargs, "max_iter": cap}.items() if value != "absent"}
        folder = changed(tmp_path / str(cap), iter_decider_kwargs=own) if (tmp_path / str(cap)).mkdir() is None else None
        with torch.no_grad():
            out = layouts.load(folder)(IDS, MASK, return_logits=True)
        torch.testing.assert_close(out.logits[VALID], OUTPUTS["mlp_eval.logits"][VALID], **LOGITS)


def test_evaluation_decides_by_the_trained_weights_at_a_threshold_of_its_own(tmp_path):
    folder = changed(tmp_path, eval_iter_decider_kwargs={"threshold": 0.6})
    for model in (
        layouts.load(folder),
        layouts.load(layouts.load(folder).save(tmp_path / "own")),
        official().reconfigure(eval_iter_decider_kwargs={"threshold": 0.6}).eval(),
    ):
        with torch.no_grad():
            out = model(IDS, MASK)
        torch.testing.assert_close(out.decider_logit[VALID], OUTPUTS["mlp_eval.decider_logits_depth1"], **LOGITS)
        assert torch.equal(out.again[VALID], OUTPUTS["mlp_eval.decider_logits_depth1"].sigmoid() > 0.6)
        assert model.decider.effective_threshold != 0.6 and len({id(p) for p in model.parameters()}) == len(list(model.parameters()))
        model.set_threshold(0.9)
        assert model.active_decider().effective_threshold == pytest.approx(0.9)
    kwargs = {**official().tah.iter_decider_kwargs, "load_path": str(CHECKPOINT)}
    other = layouts.load(
        CHECKPOINT,
        iter_decider="IterLabelDecider",
        iter_decider_kwargs={"max_iter": 2},
        eval_iter_decider="MLPIterDecider",
        eval_iter_decider_kwargs=kwargs,
    )
    again = layouts.load(other.save(tmp_path / "evaluated"))
    with torch.no_grad():
        for model in (other, again, other.reconfigure().eval()):
            assert torch.equal(model(IDS, MASK).iterations, OUTPUTS["mlp_eval.iter_count"])
    with pytest.raises(SettingsError, match="load_path"):
        official(eval_iter_decider_kwargs={"hidden_dims": [8]})


def test_an_old_config_without_output_updater_does_not_add_logits(tmp_path):
    model = layouts.load(changed(tmp_path, input_updater="TrivialUpdater", iter_attention_mode="duo"))
    with torch.no_grad():
        out = model(IDS, MASK, return_logits=True)
        twice = out.iterations > 1
    assert model.tah.output_updater == "NoneUpdater" and bool(twice.any())
    once = VALID & ~twice
    torch.testing.assert_close(out.logits[once], OUTPUTS["mlp_eval.logits"][once], **LOGITS)
    assert not torch.allclose(out.logits[twice], OUTPUTS["mlp_eval.logits"][twice], atol=1e-2)


def test_the_seed_spelling_means_the_published_recipe():
    config = read_config(
        {"iter_decider": "FixedLabelIterDecider", "iter_label_generator": "FixedIterLabelGenerator", "input_updater": "AdditiveUpdater"}
    )
    assert (config.iter_decider, config.input_updater, config.output_updater) == (
        "IterLabelDecider",
        "TrivialUpdater",
        "AdditiveLogitsUpdater",
    )


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"iter_decider": "SmoothTransitionIterDecider"}, "no released code"),
        ({"adapter": "cascade"}, "no released code"),
        ({"iter_decider": "MLPIterDecidr"}, "Did you mean 'MLPIterDecider'"),
        ({"max_itr": 2}, "Did you mean 'max_iter'"),
        ({"iter_decider": "MLPIterDecider", "iter_decider_kwargs": {"hidden_dim": [4]}}, "hidden_dims"),
        ({"max_iter": "2"}, "max_iter"),
    ],
)
def test_wrong_settings_are_named(values, sentence):
    with pytest.raises(SettingsError, match=sentence):
        TahConfig.check(**values)


def test_a_decider_that_does_not_fit_is_refused(tmp_path):
    kwargs = json.loads((CHECKPOINT / "tah_config.json").read_text())["iter_decider_kwargs"]
    with pytest.raises(SettingsError, match="hidden state 4"):
        official(iter_decider_kwargs={**kwargs, "hidden_states_layer_nums": [0, 1, 4]})
    with pytest.raises(SettingsError, match="largest logits"):
        official(iter_decider_kwargs={**kwargs, "topk": 97})
    with pytest.raises(CheckpointError, match="lora"):
        official(adapter_kwargs={"r": 5, "lora_alpha": 8})
    with pytest.raises(CheckpointError, match="MLPIterDecider"):
        folder = changed(tmp_path)
        (folder / "iter_decider.bin").unlink()
        torch.save({"class": "IterLabelDecider", "state_dict": {}, "init_args": {}}, folder / "iter_decider.bin")
        layouts.load(folder)


@pytest.mark.parametrize("dense", [True, False])
def test_half_precision_backbones_and_autocast_work(step1, dense, monkeypatch):
    monkeypatch.setattr("lab.models.vocab.SMALL", 10**6 if dense else 0)
    with torch.no_grad():
        half, full = (official(dtype=kind)(IDS, MASK, return_logits=True) for kind in ("bfloat16", "float32"))
    same = VALID & (half.iterations == full.iterations)
    assert same.sum() > 20 and float((half.logits.float() - full.logits)[same].abs().mean()) < 0.1
    with torch.autocast("cpu", torch.bfloat16):
        loss = step1(IDS, MASK, LABELS, COUNTS).loss
    loss.backward()
    assert float(loss) == pytest.approx(float(OUTPUTS["step1.loss"][0]), rel=0.02)
    assert gradient_norm(step1) == pytest.approx(META["step1"]["grad_global_norm, n_params_with_grad"][0], rel=0.1)
