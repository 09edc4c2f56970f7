"""CoLaR's layouts open, say what they lack, and are written back."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import lab
from lab.errors import SettingsError
from lab.latent.sampling import Sampling
from lab.methods.colar.checkpoint import export_latenttts, export_official
from lab.methods.colar.config import ColarSettings
from lab.methods.colar.stages import start
from lab.models.tokenizers import word_tokenizer

FOLDER = Path(__file__).parents[1] / "fixtures" / "colar"
IDS = {"sep_id": 1, "eos_id": 0}
GREEDY = {"sampling": Sampling(), "latent_temperature": 0.0, "end_temperature": 0.0, "thoughts": 6}


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """The tiny official checkpoint and the base model it was trained from, as folders."""
    folder = tmp_path_factory.mktemp("colar")
    frozen = load_file(FOLDER / "frozen_base_state.safetensors")
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=99, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, **sizes))
    state = {key.removeprefix("llm.base_model.model.").replace(".base_layer", ""): value for key, value in frozen.items()}
    base.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    base.save_pretrained(folder / "base")
    torch.save({"state_dict": load_file(FOLDER / "trainable_state.safetensors"), "epoch": 3}, folder / "colar_best.ckpt")
    return folder


def opened(folder, **more):
    alpha = 0.25 * 8
    return lab.load(folder / "colar_best.ckpt", backbone=str(folder / "base"), embeds_std=0.018, lora_alpha=alpha, **IDS, **more)


def test_the_training_checkpoint_opens_on_its_backbone(official):
    model = opened(official)
    assert model.method == "colar" and model.config.lp_intermediate_size == 48 and not model.config.lp_deterministic
    frozen, trained = load_file(FOLDER / "frozen_base_state.safetensors"), load_file(FOLDER / "trainable_state.safetensors")
    stem = "llm.base_model.model.model.layers.1.self_attn.v_proj"
    change = 0.25 * trained[f"{stem}.lora_B.default.weight"] @ trained[f"{stem}.lora_A.default.weight"]
    torch.testing.assert_close(model.backbone.model.layers[1].self_attn.v_proj.weight, frozen[f"{stem}.base_layer.weight"] + change)


def test_the_written_reasoning_that_training_starts_from_opens_with_a_new_head(official, tmp_path, caplog):
    state = torch.load(official / "colar_best.ckpt", weights_only=True)["state_dict"]
    written = tmp_path / "cot_best.ckpt"
    torch.save({"state_dict": {key: value for key, value in state.items() if key.startswith("llm.")}}, written)
    model = lab.load(written, backbone=str(official / "base"), lora_alpha=2, lp_intermediate_size=40, **IDS)
    assert "written reasoning" in caplog.text and model.config.lp_intermediate_size == 40 and not model.config.lp_deterministic
    for ours, trained in zip(model.backbone.parameters(), opened(official).backbone.parameters(), strict=True):
        torch.testing.assert_close(ours, trained)
    tokenizer = word_tokenizer([f"w{number}" for number in range(96)] + ["###"])
    tokenizer.save_pretrained(shutil.copytree(official / "base", tmp_path / "base"))
    begun = start(str(tmp_path / "base"), str(written), ColarSettings(lora_r=4, lora_alpha=2, lp_intermediate_size=24), 0)
    assert begun.config.lp_intermediate_size == 24 and hasattr(begun.backbone, "merge_and_unload")


def test_the_scale_of_thoughts_is_the_published_one_of_a_known_backbone(official, tmp_path):
    named = tmp_path / "DeepSeek-R1-Distill-Qwen-1.5B"
    named.symlink_to(official / "base")
    stds = [lab.load(official / "colar_best.ckpt", backbone=str(base), **IDS).config.embeds_std for base in (named, official / "base")]
    table = load_file(FOLDER / "frozen_base_state.safetensors")["llm.base_model.model.model.embed_tokens.weight"]
    assert stds == [0.03, pytest.approx(float(table.std()))]


def test_what_the_file_cannot_say_is_asked_for(official):
    with pytest.raises(SettingsError, match="backbone="):
        lab.load(official / "colar_best.ckpt", **IDS)
    with pytest.raises(SettingsError, match="sep_id"):
        lab.load(official / "colar_best.ckpt", backbone=str(official / "base"))
    with pytest.raises(SettingsError, match="backbone"):
        lab.load(official / "colar_best.ckpt", backbon=str(official / "base"))


@pytest.mark.parametrize("layout", ["own", "official", "latenttts"])
def test_every_layout_round_trips(official, tmp_path, layout):
    model = opened(official)
    want = model.generate([[40, 41, 42], [50, 51, 52, 53]], **GREEDY)
    if layout == "own":
        again = lab.load(model.save(tmp_path / "model"))
    elif layout == "official":
        again = lab.load(export_official(model, tmp_path / "all.ckpt"), backbone=str(official / "base"), embeds_std=0.018, **IDS)
    else:
        again = lab.load(export_latenttts(model, tmp_path / "release"), **IDS)
        assert again.config.lp_deterministic and again.config.embeds_std == pytest.approx(0.018)
    got = again.generate([[40, 41, 42], [50, 51, 52, 53]], **GREEDY)
    assert [row.ids for row in got.rows] == [row.ids for row in want.rows]
    assert [row.thoughts for row in got.rows] == [row.thoughts for row in want.rows]


def test_a_latenttts_release_opens(tmp_path):
    source = Path(__file__).parents[1] / "fixtures" / "latenttts"
    config = json.loads((source / "colar_config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(load_file(source / "colar_state.safetensors"), tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = lab.load(tmp_path)
    assert model.method == "colar" and model.config.lp_deterministic
    result = model.generate([[5, 6, 7]], min_thoughts=0, max_new_tokens=4, **GREEDY)
    assert len(result.rows) == 1 and model.config.sep_id == 40
    own = word_tokenizer([str(number) for number in range(58)] + ["###"])
    assert lab.load(tmp_path, tokenizer=own).config.sep_id == 58, "the tokenizer knows its ids better than the config"
