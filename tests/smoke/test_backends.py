"""Our models and plain transformers generation answer the same evaluation the same way."""

import math
from pathlib import Path
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
FIXTURES = Path(__file__).parents[1] / "fixtures"
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


def test_a_model_of_second_passes_is_evaluated_by_its_own_generation(tmp_path):
    from lab.models.layouts import load

    model = load(FIXTURES / "tah" / "checkpoint_official_layout")
    prompts = [[5, 9, 3 + i] for i in range(4)]
    examples = [Example(id=str(i), question=" ".join(map(str, ids)), answer="1") for i, ids in enumerate(prompts)]
    found = {}
    for policy in ("never", "always", "decider"):
        generator = Latent(WithIds(model, prompts), policy=policy)
        found[policy] = evaluate(generator, examples, "ids", tmp_path / policy, Decoding(max_new_tokens=10), scorer=score, repeat=2)
    never, always, decider = (found[name].passes_per_token for name in ("never", "always", "decider"))
    assert never == 1.0 and 1.5 < always <= 2.0 and never <= decider <= always
    assert all(result.output_tokens > 0 for result in found.values())


class WithIds:
    """A model asked in token ids, where the test has no text."""

    def __init__(self, model, prompts):
        self.model, self.prompts = model, prompts
        self.method, self.source, self.settings = model.method, model.source, model.settings

    def generate(self, examples, samples, **options):
        return self.model.generate([self.prompts[int(example.id)] for example in examples], samples, **options)


def test_thoughts_count_as_passes(tmp_path):
    from lab.methods.coconut.config import CoconutSettings
    from lab.methods.coconut.model import CoconutModel

    tokenizer = byte_tokenizer()
    backbone = load_backbone("toy:gpt2-micro", vocab_size=len(tokenizer), initializer_range=0.3)
    model = CoconutModel.start(backbone, tokenizer, CoconutSettings(c_thought=2)).eval()
    decoding = Decoding(max_new_tokens=6)
    result = evaluate(Latent(model, thoughts=4), EXAMPLES, "sums", tmp_path / "a", decoding, scorer=score)
    assert result.passes == pytest.approx(result.output_tokens + 4)
