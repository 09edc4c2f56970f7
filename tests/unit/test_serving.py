"""What is sent to a server, and what is done when it is busy, wrong or gone. The server here is a small real one on loopback."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from lab.data.examples import Example
from lab.errors import DeviceError, SettingsError
from lab.evaluate import Decoding, Request, evaluate
from lab.serving import Client, OpenAI, refuse_latent, serve

EXAMPLES = [Example(id=str(i), question=f"{i} + 1 = ?", answer=str(i + 1)) for i in range(6)]
SAMPLED = Decoding(temperature=0.6, top_p=0.95, top_k=20, max_new_tokens=9, seed=4)


def score(text, example):
    right = text.endswith(example.answer)
    return SimpleNamespace(strict_answer=text, strict_correct=right, lenient_answer=text, lenient_correct=right)


@pytest.fixture
def server():
    """Answers n + 1; `server.faults` are statuses it gives first; `bodies` is what it was sent; it refuses number `refuses`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            here.bodies.append((self.path, body, self.headers.get("Authorization")))
            if len(here.bodies) == here.refuses:
                self.reply(404, {"error": "gone"})
                return
            if here.faults:
                self.reply(here.faults.pop(0), {"error": "no such model"})
                return
            chat = "messages" in body
            text = str(int((body["messages"][0]["content"] if chat else body["prompt"]).split()[0]) + 1)
            said = {"message": {"content": text, **here.extra}} if chat else {"text": text}
            choice = {**said, "finish_reason": "length" if text == "3" else "stop"}
            self.reply(200, {"choices": [choice], "usage": {"prompt_tokens": 5, "completion_tokens": len(text)}})

        def reply(self, status, value):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(value).encode())

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    here = SimpleNamespace(bodies=[], faults=[], refuses=0, extra={}, url=f"http://127.0.0.1:{http.server_port}")
    thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield here
    http.shutdown()
    http.server_close()


def ask(server, decoding=SAMPLED, folder=None, **options):
    generator = OpenAI(Client.check(**{"base_url": server.url, "model": "m", "engine": "vllm", **options}))
    if folder:
        return evaluate(generator, EXAMPLES, "sums", folder, decoding, scorer=score, repeat=2)
    wanted = [Request(number, 0, example) for number, example in enumerate(EXAMPLES)]
    return dict((request.number, output) for request, output in generator.generate(wanted, decoding))


@pytest.mark.parametrize("chat", [True, False])
def test_answers_counts_and_ends(server, chat):
    found = ask(server, chat=chat)
    assert [found[i].text for i in range(6)] == ["1", "2", "3", "4", "5", "6"]
    assert [found[i].finish for i in range(6)] == ["stop", "stop", "length", "stop", "stop", "stop"]
    assert (found[0].tokens, found[0].prompt_tokens, found[0].passes) == (1, 5, 1.0)
    path, body, key = server.bodies[0]
    assert path == ("/v1/chat/completions" if chat else "/v1/completions") and key is None
    assert (body["temperature"], body["top_p"], body["top_k"], body["min_p"], body["max_tokens"]) == (0.6, 0.95, 20, 0.0, 9)


def test_each_engine_is_told_in_its_own_words(server):
    ask(server, engine="transformers")
    body = server.bodies[-1][1]
    config = json.loads(body["generation_config"])
    assert config == {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "max_new_tokens": 9} and "top_k" not in body
    ask(server, Decoding(temperature=0.6, top_p=0.9), engine="openai")
    assert {"top_k", "min_p", "generation_config"}.isdisjoint(server.bodies[-1][1])
    ask(server, Decoding(), engine="vllm")
    assert server.bodies[-1][1]["temperature"] == 0 and "top_p" not in server.bodies[-1][1]
    sent = len(server.bodies)
    with pytest.raises(SettingsError, match="no top_k"):
        ask(server, engine="openai")
    assert len(server.bodies) == sent


def test_seeds_belong_to_question_and_sample(server, tmp_path):
    ask(server, folder=tmp_path / "a")
    seeds = {(body["messages"][0]["content"], body["seed"]) for _, body, _ in server.bodies}
    assert len(seeds) == 12 and all(0 <= seed < 2**31 for _, seed in seeds)
    server.bodies.clear()
    ask(server, folder=tmp_path / "b", concurrency=1)
    assert seeds == {(body["messages"][0]["content"], body["seed"]) for _, body, _ in server.bodies}


def test_thinking_handed_over_apart_belongs_to_the_answer(server):
    server.extra = {"reasoning_content": "hm"}
    assert ask(server)[0].text == "<think>hm</think>1"


def test_a_busy_server_is_asked_again(server, monkeypatch):
    waits = []
    monkeypatch.setattr("lab.serving.time.sleep", waits.append)
    server.faults = [503, 429, 500]
    assert len(ask(server, concurrency=1)) == 6
    assert waits == [0.5, 1.0, 2.0]


def test_refusals_and_silence_end_with_a_sentence_and_keep_what_was_answered(server, monkeypatch, tmp_path):
    monkeypatch.setattr("lab.serving.time.sleep", lambda _: None)
    server.faults = [400]
    with pytest.raises(DeviceError, match=r"refused the request \(400\).*no such model"):
        ask(server, concurrency=1)
    server.faults = [503] * 3
    with pytest.raises(DeviceError, match=r"did not answer \(status 503.*asked 3 times"):
        ask(server, concurrency=1, retries=2)
    with pytest.raises(DeviceError, match="did not answer"):
        ask(SimpleNamespace(url="http://127.0.0.1:9"), retries=1)
    server.bodies.clear()
    server.refuses = 9
    with pytest.raises(DeviceError, match="refused"):
        ask(server, folder=tmp_path, concurrency=1)
    kept = len((tmp_path / "samples.jsonl").read_text().splitlines())
    assert kept == len(server.bodies) - 1 >= 8, "all that was answered, also while the refusal was on its way"
    server.bodies.clear()
    server.refuses = 0
    result = ask(server, folder=tmp_path, concurrency=1)
    assert len(server.bodies) == 12 - kept
    assert (result.samples, result.strict.mean, result.truncated) == (12, 1.0, 2)


def test_keys_come_from_the_environment(server, monkeypatch):
    with pytest.raises(SettingsError, match="LAB_TEST_KEY.*not set"):
        ask(server, key_variable="LAB_TEST_KEY")
    monkeypatch.setenv("LAB_TEST_KEY", "k")
    ask(server, key_variable="LAB_TEST_KEY")
    assert server.bodies[-1][2] == "Bearer k"


@pytest.mark.parametrize("name, content", [("tah_config.json", {"max_iter": 2}), ("lab.json", None)])
def test_a_model_that_thinks_between_words_is_not_sent_to_a_server(tmp_path, name, content):
    content = content or {"format": 1, "method": "tah", "settings": {}, "backbone": ""}
    (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    for attempt in (lambda: OpenAI(Client.check(base_url="http://127.0.0.1:9", model=str(tmp_path))), lambda: refuse_latent(str(tmp_path))):
        with pytest.raises(SettingsError, match="method tah.*one pass a token"):
            attempt()
    with pytest.raises(SettingsError, match="method tah"), serve(str(tmp_path)):
        pass


def test_engines_that_cannot_start(tmp_path, monkeypatch):
    for engine, tp_size, message in (("transformers", 2, "one device"), ("vlm", 1, "Did you mean 'vllm'")):
        with pytest.raises(SettingsError, match=message), serve(str(tmp_path), engine, tp_size):
            pass
    monkeypatch.setattr("lab.serving._installed", lambda _: False)
    with pytest.raises(DeviceError, match=r"pip install vllm"), serve(str(tmp_path), "vllm", 2):
        pass
