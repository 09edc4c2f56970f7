"""Sizes from configurations alone: the published totals, Think-at-Hard's budget, and agreement with models that are really built."""

import pytest

from lab.errors import SettingsError
from lab.models.backbones import load_backbone, parameter_count
from lab.models.plan import PUBLISHED, planned_config, planned_model

TOTALS = {
    "Qwen/Qwen3-0.6B-Base": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "openai-community/gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}


def parameter_counts(name, method="none", settings=None, *, pruned=0, **size_overrides):
    """Parameters by part: embeddings, layers (and one of them), head (0 when tied), the rest, the method's parts, total, trained."""
    model = planned_model(planned_config(name, pruned=pruned, **size_overrides), method, settings or {})
    backbone = model.backbone
    stack = backbone.transformer.h if backbone.config.model_type == "gpt2" else backbone.model.layers
    counts = {"embeddings": parameter_count(backbone.get_input_embeddings()), "one layer": parameter_count(stack[0])}
    counts |= {"layers": parameter_count(stack), "head": 0 if backbone.config.tie_word_embeddings else counts["embeddings"]}
    counts["norms, positions"] = parameter_count(backbone) - counts["embeddings"] - counts["layers"] - counts["head"]
    counts |= {part: parameter_count(module) for part, module in model.parts.named_children()}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return counts | {"total": parameter_count(model), "trained": trained}


@pytest.mark.parametrize(("name", "total"), TOTALS.items())
def test_published_totals(name, total):
    counts = parameter_counts(name)
    assert counts["total"] == counts["trained"] == total
    assert counts["embeddings"] + counts["layers"] + counts["head"] + counts["norms, positions"] == total


def test_every_built_in_shape_is_checked_above():
    assert len(TOTALS) == len(PUBLISHED)


@pytest.mark.parametrize(
    ("name", "rank", "decider", "millions"),
    [
        ("Qwen/Qwen3-1.7B-Base", 32, {}, (34.87, 18.32, 50.3)),
        (
            "Qwen/Qwen3-0.6B-Base",
            16,
            {"hidden_states_size": 1024, "hidden_states_layer_nums": [0, 7, 13, 20, 26], "hidden_dims": [256] * 6},
            (10.09, 4.90, 15.7),
        ),
    ],
)
def test_the_budget_of_think_at_hard(name, rank, decider, millions):
    """tah.md section 1: LoRA, decider, and the layer that pruning removes."""
    adapter = {"r": rank, "lora_alpha": 2 * rank}
    counts = parameter_counts(name, "tah", {"iter_decider": "MLPIterDecider", "iter_decider_kwargs": decider, "adapter_kwargs": adapter})
    assert [counts["lora"], counts["decider"], counts["one layer"]] == pytest.approx([m * 1e6 for m in millions], rel=2e-3)
    assert counts["total"] == TOTALS.get(name, 1_720_574_976) + counts["lora"] + counts["decider"]


@pytest.mark.parametrize("arch", ["gpt2", "llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_counts_are_those_of_the_model_built(arch, tied):
    counts = parameter_counts(f"toy:{arch}", layers=3, tied=tied)
    assert counts["total"] == parameter_count(load_backbone(f"toy:{arch}", layers=3, tied=tied))
    pruned = parameter_counts(f"toy:{arch}", layers=3, tied=tied, pruned=1)
    assert counts["total"] - pruned["total"] == counts["one layer"]


def test_no_weight_is_made():
    model = planned_model(planned_config("Qwen/Qwen3-8B"), "none", {})
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_a_folder_gives_its_own_shape(tmp_path):
    load_backbone("toy:llama-micro", layers=3).save_pretrained(tmp_path)
    assert parameter_counts(str(tmp_path)) == parameter_counts("toy:llama-micro", layers=3)


@pytest.mark.parametrize(
    ("name", "settings", "word"),
    [
        ("Qwen/Qwen3-17B", {}, "qwen3-1.7b"),
        ("toy:llama", {"pruned": 2}, "2 of the 2 layers"),
        ("gpt2", {"layers": 3}, "toy backbones only"),
    ],
)
def test_what_cannot_be_planned(name, settings, word):
    with pytest.raises(SettingsError, match=word):
        parameter_counts(name, **settings)
