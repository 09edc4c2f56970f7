"""Both official layouts of adaptive models: read, computed with, written back; and merging."""

import json

import pytest
import torch
from adaptive_fixture import lora_model, merged_folder, numbers, tensors, tokenizer  # noqa: F401 - a fixture
from safetensors.torch import load_file, save_file

import lab
from lab.errors import CheckpointError, SettingsError
from lab.methods.adaptive.checkpoint import lora_weights, save_adapter, save_merged
from lab.methods.adaptive.config import SETTINGS_KEY
from lab.methods.adaptive.model import read_ids, scores


def logits_of(model, name="latent6by1"):
    ids, mask = (tensors()[f"batch/{name}/latent_{kind}"] for kind in ("input_ids", "attention_mask"))
    with torch.no_grad():
        return scores(model.thinker, ids, read_ids(model.thinker, ids, mask).last)


def same(found, wanted, real=None):
    real = tensors()["batch/latent6by1/latent_attention_mask"].bool() if real is None else real
    torch.testing.assert_close(found[real].clamp(min=-1e9), wanted[real].clamp(min=-1e9), atol=1e-4, rtol=0)


def test_merged_release_gives_the_official_logits(merged_folder):  # noqa: F811
    model = lab.load(merged_folder)
    assert model.method == "adaptive" and model.config.filter == "MLP" and len(model.config.unused) == 60
    same(logits_of(model), tensors("merged_and_grpo")["merged/latent6by1/logits"])


def test_merging_changes_nothing_and_gives_the_official_weights():
    model = lora_model()
    before = logits_of(model)
    same(before, logits_of(model.merge()))
    official = tensors("merged_model")
    assert model.config.special == "" and not lora_weights(model)
    torch.testing.assert_close(model.backbone.state_dict()["model.embed_tokens.weight"], official["_base_model.model.embed_tokens.weight"])
    torch.testing.assert_close(
        model.backbone.model.layers[1].mlp.up_proj.weight.detach(), official["_base_model.model.layers.1.mlp.up_proj.weight"]
    )


def test_the_merged_layout_written_is_the_released_one(tmp_path):
    model = lora_model()
    with pytest.raises(SettingsError, match="Merge the model first"):
        save_merged(model, tmp_path / "early")
    save_merged(model.merge(), tmp_path / "out")
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert {key: list(value.shape) for key, value in state.items()} == numbers("formats")["merged_keys"]
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert told[SETTINGS_KEY] == numbers("merged_config")[SETTINGS_KEY] and told["architectures"] == ["LatentThinkingModel"]
    same(logits_of(lab.load(tmp_path / "out")), tensors("merged_and_grpo")["merged/latent6by1/logits"])


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    """The base under the adapter: the fixture's backbone with the vocabulary it had before the tokens came."""
    folder = tmp_path_factory.mktemp("base")
    model = lora_model().merge()
    model.backbone.resize_token_embeddings(320)
    model.backbone.save_pretrained(folder)
    return folder


def test_training_checkpoint_is_written_as_published_and_read_back(tmp_path, base_folder):
    model = lora_model()
    save_adapter(model, tmp_path / "step_1", base="somewhere/llama")
    written = load_file(tmp_path / "step_1" / "adapter_model.safetensors")
    assert {key: list(value.shape) for key, value in written.items()} == numbers("formats")["adapter_keys"]
    assert not written["base_model.model._base_model.model.embed_tokens.weight"][320:324].any()
    clean = _base_without_lora(base_folder)
    back = lab.load(tmp_path / "step_1", backbone=str(clean))
    same(logits_of(back), logits_of(lora_model()))
    kept = lab.load(tmp_path / "step_1", backbone=str(clean), keep_lora=True)
    assert lora_weights(kept) and kept.config.special == "tied"
    same(logits_of(kept), logits_of(lora_model()))


def _base_without_lora(folder):
    """The adapter belongs to the weights before merging, so the base folder gets those back."""
    state = lora_model().backbone.state_dict()
    plain = {key.replace(".base_layer", ""): value for key, value in state.items() if ".lora_" not in key}
    saved = load_file(folder / "model.safetensors")
    plain = {key: plain[key][: value.shape[0]].contiguous() for key, value in saved.items()}
    save_file(plain, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_our_own_format_keeps_everything(tmp_path):
    model = lora_model()
    model.but(most_trained=10, head_trained=True)
    model.save(tmp_path / "own")
    assert lora_weights(model)  # saving leaves the model as it was
    back = lab.load(tmp_path / "own")
    assert back.config.most_trained == 10 and back.config.special == ""
    same(logits_of(back), logits_of(lora_model()))


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, merged_folder):  # noqa: F811
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(merged_folder, broken)
    state = load_file(broken / "model.safetensors")
    state.pop("recurrent_filter.norm.bias")
    save_file(state, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="norm.bias"):
        lab.load(broken)
    told = json.loads((broken / "config.json").read_text())
    told[SETTINGS_KEY]["new_switch"] = 1
    (broken / "config.json").write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match="new_switch"):
        lab.load(broken)
    with pytest.raises(SettingsError, match="head_trained"):
        lab.load(merged_folder, head_traind=True)
