"""The tiny random model of the adaptive fixtures (numbers of the official code), with and without its LoRA."""

import json
from functools import cache
from pathlib import Path

import pytest
from safetensors.torch import load_file

HERE = Path(__file__).parent.parent / "fixtures" / "adaptive"


@cache
def numbers(name: str):
    return json.loads((HERE / f"{name}.json").read_text())


@cache
def tensors(name: str = "tensors"):
    return load_file(HERE / f"{name}.safetensors")


@cache
def tokenizer():
    from lab.models.tokenizers import load_tokenizer

    return load_tokenizer(str(HERE / "tokenizer"))


def adapter_state():
    """The wrapped model's state under the names of an adapter file, and the base's weights."""
    state, base = {}, {}
    for key, value in tensors("llama_lora_state_dict").items():
        if "original_module" in key:
            continue
        name = key.replace(".modules_to_save.default", "").replace(".default.weight", ".weight")
        if "_base_model." in key and ".lora_" not in key:
            base[name.removeprefix("base_model.model._base_model.").replace(".base_layer", "")] = value
        mine = "recurrent_filter" in key or "_embed." in key or ".lora_" in key
        if mine or "embed_tokens" in key or "lm_head" in key:
            state[name] = value
    return state, base


def lora_model(**settings):
    from lab.methods.adaptive.checkpoint import from_adapter
    from lab.models.backbones import load_backbone
    from lab.models.loading import load_exact

    about = numbers("losses")
    c, l = about["config"], about["lora"]
    shape = dict(layers=c["num_hidden_layers"], hidden=c["hidden_size"], intermediate=c["intermediate_size"], heads=4, kv_heads=2)
    rest = dict(vocab_size=about["vocab_size_after_resize"], max_positions=1024, norm_eps=c["rms_norm_eps"])
    backbone = load_backbone("toy:llama-tiny", **shape, **rest)
    state, base = adapter_state()
    load_exact(backbone, base)
    creation = {"is_latent": True, "latent_settings_dict": {"recurrent_filter_mode": "MLP", **settings}}
    adapter = {"r": l["r"], "lora_alpha": l["lora_alpha"], "lora_dropout": l["lora_dropout"], "target_modules": l["target_modules"]}
    return from_adapter(backbone, tokenizer(), creation, adapter, state, "the fixture").eval()


@pytest.fixture(scope="module")
def merged_folder(tmp_path_factory):
    import shutil

    folder = tmp_path_factory.mktemp("merged")
    shutil.copy(HERE / "merged_model.safetensors", folder / "model.safetensors")
    shutil.copy(HERE / "merged_config.json", folder / "config.json")
    for path in (HERE / "tokenizer").iterdir():
        shutil.copy(path, folder / path.name)
    return folder
