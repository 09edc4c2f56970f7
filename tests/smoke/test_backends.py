"""Our models and plain transformers generation answer the same evaluation the same way."""

import math
from types import SimpleNamespace

import pytest
import torch

from lab.backends import HF, Latent, runs
from lab.data.examples import Example
from lab.evaluate import Decoding, Request, evaluate
from lab.models.backbones import load_backbone
from lab.models.latent_model import LatentModel
from lab.models.tokenizers import byte_tokenizer

torch.set_num_threads(1)
EXAMPLES = [Example(id=str(i), question="12 + 3 = ?" * (1 + i % 3), answer="15") for i in range(5)]
SAMPLED = Decoding(temperature=0.8, top_k=20, top_p=0.9, max_new_tokens=12, seed=3)


def score(text, example):
    return SimpleNamespace(strict_answer=text or None, strict_correct=False, lenient_answer=None, lenient_correct=False)


@pytest.fixture(scope="module", params=["gpt2", "qwen3"])
def model(request):
    tokenizer = byte_tokenizer(chat=True)
    backbone = load_backbone(f"toy:{request.param}-micro", vocab_size=len(tokenizer), initializer_range=0.3, seed=1)
    return LatentModel(backbone, tokenizer)


def texts(folder, generator, decoding=SAMPLED, **options):
    result = evaluate(generator, EXAMPLES, "sums", folder, decoding, scorer=score, **options)
    return {(row["id"], row["sample"]): (row["output"], row["output_tokens"], row["input_tokens"], row["finish"]) for row in result.rows}


@pytest.mark.parametrize("decoding", [SAMPLED, Decoding(max_new_tokens=12)])
def test_both_backends_give_the_same_answers(tmp_path, model, decoding):
    ours = texts(tmp_path / "a", Latent(model), decoding, repeat=2)
    theirs = texts(tmp_path / "b", HF(model.backbone, model.tokenizer), decoding, repeat=2)
    assert ours == theirs
    assert len({text for text, *_ in ours.values()}) > 1


def test_answers_do_not_depend_on_batch_range_or_resume(tmp_path, model):
    whole = texts(tmp_path / "whole", Latent(model), repeat=3)
    for name, generator in {"latent": Latent(model), "hf": HF(model.backbone, model.tokenizer)}.items():
        small = SAMPLED.but(batch=2)
        texts(tmp_path / name, generator, small, repeat=1, data_range=(1, 2))
        texts(tmp_path / name, generator, small, repeat=2, ids=["3", "0"])
        assert texts(tmp_path / name, generator, small, repeat=3) == whole


def test_passes_of_a_plain_model_are_its_tokens(tmp_path, model):
    result = evaluate(Latent(model), EXAMPLES, "sums", tmp_path, SAMPLED, scorer=score)
    assert result.output_tokens > 0 and result.passes == pytest.approx(result.output_tokens)
    assert result.truncated == sum(row["output_tokens"] == 12 for row in result.rows) and not math.isnan(result.passes_per_token)


def test_groups_are_runs_of_whole_questions():
    wanted = [Request(n, s, EXAMPLES[0]) for n, s in [(0, 0), (0, 1), (1, 0), (1, 1), (4, 1), (5, 0), (5, 1), (6, 0)]]
    groups = [[(r.number, r.sample) for r in group] for group in runs(reversed(wanted), batch=3)]
    assert groups == [[(0, 0), (0, 1), (1, 0), (1, 1)], [(4, 1), (5, 0), (5, 1)], [(6, 0)]]
