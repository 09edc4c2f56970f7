"""A real `transformers serve` on this machine answers an evaluation as the same model does in this process."""

from importlib.util import find_spec
from types import SimpleNamespace

import pytest

from lab.backends import HF
from lab.data.examples import Example
from lab.errors import DeviceError
from lab.evaluate import Decoding, evaluate
from lab.models.backbones import load_backbone
from lab.models.tokenizers import byte_tokenizer
from lab.serving import OpenAI, serve

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not all(map(find_spec, ("fastapi", "uvicorn", "openai"))), reason='needs: pip install "lab[serving]"'),
]
EXAMPLES = [Example(id=str(i), question="12 + 3 = ?" * (1 + i % 3), answer="15") for i in range(5)]


def score(text, example):
    return SimpleNamespace(strict_answer=text or None, strict_correct=False, lenient_answer=None, lenient_correct=False)


def texts(result):
    return {(row["id"], row["sample"]): row["output"] for row in result.rows}


def test_a_real_server(tmp_path):
    tokenizer = byte_tokenizer(chat=True)
    model = load_backbone("toy:qwen3-micro", vocab_size=len(tokenizer), initializer_range=0.3, seed=1)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")

    def run(generator, folder, **decoding):
        return evaluate(generator, EXAMPLES, "sums", tmp_path / folder, Decoding(max_new_tokens=12, **decoding), scorer=score, repeat=2)

    here = run(HF(model, tokenizer), "here")
    with serve(str(tmp_path / "model"), options=["--device", "cpu"], wait=300, concurrency=2) as client:
        there = run(OpenAI(client), "there")
        assert {key: text.strip() for key, text in texts(there).items()} == {key: text.strip() for key, text in texts(here).items()}
        assert there.output_tokens > 0 and there.truncated == here.truncated
        alone = OpenAI(client.but(concurrency=1))
        sampled = run(alone, "sampled", temperature=1.0, top_k=50)
        assert texts(sampled) == texts(run(alone, "again", temperature=1.0, top_k=50)) != texts(there), (
            "seeds hold where one asks at a time"
        )
        with pytest.raises(DeviceError, match="refused the request"):
            run(OpenAI(client.but(model="other")), "other")
