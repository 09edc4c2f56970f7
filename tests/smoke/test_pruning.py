"""Layers are measured as if each were removed alone, dropped together, and what is left is an ordinary smaller model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lab.errors import DataError, SettingsError
from lab.models.backbones import load_backbone
from lab.models.decoder import Decoder
from lab.models.loading import load_exact
from lab.models.pruning import calibration_batches, drop_layers, perplexity, prune, rank, removal_losses
from lab.models.tokenizers import byte_tokenizer

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tah"
TEXTS = ["the cat sat on the mat", "", None, " a dog ", "one two three four five six seven", "x" * 40, "yes or no"]


@pytest.fixture
def official():
    return json.loads((FIXTURE / "prune.json").read_text())


def official_model():
    model = load_backbone("toy:qwen3", vocab_size=96, hidden=32, intermediate=64, layers=5, heads=4, kv_heads=2, head_dim=8)
    load_exact(model, load_file(FIXTURE / "prune_weights.safetensors"))
    return model


def batches_of(data):
    return [{name: torch.tensor(rows) for name, rows in batch.items()} for batch in data["calibration_batches"]]


def toy(arch, **settings):
    tokenizer = byte_tokenizer()
    return load_backbone(f"toy:{arch}-micro", vocab_size=len(tokenizer), layers=4, initializer_range=0.3, **settings), tokenizer


def naive(model, batches):
    """Each layer removed for real, the loss by transformers itself."""
    losses = []
    with torch.no_grad():
        for batch in batches:
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            losses.append(model(**batch, labels=labels, use_cache=False).loss.item())
    return sum(losses) / len(losses)


def test_official_numbers(official):
    batches = batches_of(official)
    reference, losses = removal_losses(official_model(), batches)
    assert reference == pytest.approx(official["reference_loss"], rel=1e-5)
    assert losses == pytest.approx(official["loss_without_layer"], rel=1e-5)
    assert [perplexity(loss) for loss in losses] == pytest.approx(official["ppl_without_layer"], rel=1e-4)
    assert rank(reference, losses) == official["order_by_delta_ppl"]


@pytest.mark.parametrize("count", [1, 2])
def test_official_joint_removal(official, count):
    model, wanted = official_model(), official["removed"][str(count)]
    report = prune(model, batches_of(official), count)
    assert report.removed == sorted(wanted["indices"])
    assert report.loss_after == pytest.approx(wanted["loss_after"], rel=1e-5)
    assert model.config.num_hidden_layers == wanted["config_num_hidden_layers"] == len(model.config.layer_types)
    assert [row["layer"] for row in report.rows() if row["removed"]] == report.removed
    assert [row["rank"] for row in sorted(report.rows(), key=lambda row: row["delta_ppl"])] == list(range(5))


@pytest.mark.parametrize("arch", ["gpt2", "llama", "qwen2", "qwen3"])
def test_cached_streams_equal_real_removal(arch):
    model, tokenizer = toy(arch)
    tokenizer.padding_side = "right"  # transformers counts GPT-2's positions from column 0
    batches = calibration_batches(tokenizer, TEXTS, batch_size=2)
    reference, losses = removal_losses(model, batches)
    assert reference == pytest.approx(naive(model, batches), rel=1e-5)
    for layer in range(4):
        smaller, _ = toy(arch)
        drop_layers(smaller, [layer])
        assert losses[layer] == pytest.approx(naive(smaller, batches), rel=1e-5)


@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
def test_padding_side_does_not_matter(arch):
    model, tokenizer = toy(arch)
    left = removal_losses(model, calibration_batches(tokenizer, TEXTS, batch_size=2))
    tokenizer.padding_side = "right"
    right = removal_losses(model, calibration_batches(tokenizer, TEXTS, batch_size=2))
    assert left[1] == pytest.approx(right[1], rel=1e-5) and left[0] == pytest.approx(right[0], rel=1e-5)


def test_a_layer_less_is_computed_for_each_candidate(monkeypatch):
    """Candidate i costs L-i-1 layers: L (L+1) / 2 layer calls for all of them and the reference, against L² for the naive loop."""
    model, tokenizer = toy("llama")
    calls, attend = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or attend(*a, **k))
    removal_losses(model, calibration_batches(tokenizer, TEXTS, batch_size=8))
    assert len(calls) == 4 * 5 // 2


@pytest.mark.parametrize("arch", ["gpt2", "llama", "qwen2", "qwen3"])
def test_what_is_left_saves_reloads_and_decodes_with_a_cache(tmp_path, arch):
    model, _ = toy(arch)
    drop_layers(model, [1, 2])
    model.save_pretrained(tmp_path)
    again, ids = load_backbone(str(tmp_path)), torch.tensor([[5, 9, 3, 7]])
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        assert torch.equal(again(ids, use_cache=False).logits, whole)
        cache = model(ids[:, :2], use_cache=True).past_key_values
        step = model(ids[:, 2:], past_key_values=cache, use_cache=True).logits
    assert len(cache.layers) == 2
    torch.testing.assert_close(step, whole[:, 2:], rtol=1e-4, atol=1e-4)
    assert len(Decoder(model).blocks) == 2


def test_ranking_puts_overflow_last_and_breaks_ties():
    assert rank(1.0, [2.0, float("nan"), 1.5, float("inf"), 1.5, 800.0]) == [2, 4, 0, 1, 3, 5]


def test_bad_requests_are_answered_first():
    model, tokenizer = toy("llama")
    batches = calibration_batches(tokenizer, TEXTS)
    for count in (0, 4):
        with pytest.raises(SettingsError, match="between 1 and 3"):
            prune(model, batches, count)
    with pytest.raises(SettingsError, match="float16"):
        removal_losses(model.half(), batches)
    with pytest.raises(SettingsError, match="must exist"):
        drop_layers(model, [7])
    with pytest.raises(DataError, match="nothing to predict"):
        removal_losses(model.float(), [{"input_ids": torch.tensor([[3]]), "attention_mask": torch.tensor([[1]])}])
    with pytest.raises(DataError, match="No text"):
        calibration_batches(tokenizer, ["", None])
    with pytest.raises(SettingsError, match="padding token"):
        calibration_batches(byte_tokenizer(pad=""), TEXTS)


def test_calibration_takes_the_first_texts_stripped_cut_and_masked():
    (first, second) = calibration_batches(byte_tokenizer(), TEXTS, batch_size=2, max_samples=3, max_length=10)
    assert first["input_ids"].shape == (2, 10) and second["input_ids"].shape == (1, 10)
    assert first["attention_mask"].sum(1).tolist() == [10, 5]


def test_bfloat16_is_close():
    model, tokenizer = toy("qwen3")
    batches = calibration_batches(tokenizer, TEXTS, batch_size=2)
    exact = removal_losses(model, batches)[1]
    assert removal_losses(model.bfloat16(), batches)[1] == pytest.approx(exact, rel=0.02)
