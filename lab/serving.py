"""Evaluation through a server that speaks the OpenAI interface: SGLang, vLLM, `transformers serve`, or one somewhere else."""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from pydantic import Field

from lab.config import Settings
from lab.errors import CheckpointError, DeviceError, SettingsError, unknown
from lab.evaluate import Decoding, Output, Request
from lab.launch import stop_group

log = logging.getLogger(__name__)

Engine = Literal["transformers", "vllm", "sglang", "openai"]
_INSTALL = {"transformers": 'pip install "lab[serving]"', "vllm": "pip install vllm", "sglang": 'pip install "sglang[all]"'}
_TRANSIENT = {408, 409, 425, 429, 500, 502, 503, 504}


class Client(Settings):
    """How a server is asked. `engine` decides how top-k and min-p are said: plain `openai` servers know neither."""

    base_url: str  # up to and without /v1
    model: str
    engine: Engine = "openai"
    chat: bool = True  # one user turn through the model's chat template; False: the bare text
    concurrency: int = Field(8, ge=1)
    retries: int = Field(5, ge=0)
    timeout: float = Field(600.0, gt=0)  # seconds a request may take
    key_variable: str = ""  # environment variable that holds the server's key


class OpenAI:
    """Answers from a server, as they come. Draws are the server's: where it honours `seed`, they are fixed by question and sample."""

    def __init__(self, client: Client):
        refuse_latent(client.model)
        self.client = client
        self.facts = {"backend": "openai", "engine": client.engine, "model": client.model, "chat": client.chat}

    def generate(self, requests: Sequence[Request], decoding: Decoding) -> Iterator[tuple[Request, Output]]:
        """Outputs in the order in which they finish; DeviceError for a refusal, or when a request has failed too often.

        What was asked before the refusal is answered first, so that it is kept.
        """
        _body(self.client, decoding, "", 0)  # settings that cannot be said are refused before anything is sent
        pool = ThreadPoolExecutor(self.client.concurrency)
        try:
            waiting = {pool.submit(self._answer, request, decoding): request for request in requests}
            for done in as_completed(list(waiting)):
                if done.exception():
                    break
                yield waiting.pop(done), done.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        rest = [(request, future) for future, request in waiting.items() if not future.cancelled()]
        yield from ((request, future.result()) for request, future in rest if not future.exception())
        for _, future in rest:
            future.result()  # raises

    def _answer(self, request: Request, decoding: Decoding) -> Output:
        began = time.monotonic()
        body = _body(self.client, decoding, request.example.question, seed_of(decoding.seed, request))
        reply = post(self.client, "/v1/chat/completions" if self.client.chat else "/v1/completions", body)
        try:
            choice, usage = reply["choices"][0], reply.get("usage") or {}
            text = _message(choice["message"]) if self.client.chat else choice["text"]
        except (KeyError, IndexError, TypeError):
            raise DeviceError(f"{self.client.base_url} gave a reply of an unknown form: {str(reply)[:200]}") from None
        tokens = int(usage.get("completion_tokens") or 0)
        finish = "length" if choice.get("finish_reason") == "length" else "stop"
        return Output(text, tokens, finish, float(tokens), int(usage.get("prompt_tokens") or 0), time.monotonic() - began)


def seed_of(seed: int, request: Request) -> int:
    """A 31-bit seed for one answer."""
    packed = f"{seed}/{request.number}/{request.sample}".encode()
    return int.from_bytes(hashlib.blake2b(packed, digest_size=4).digest()) >> 1


def _message(message: dict[str, Any]) -> str:
    """The whole answer: servers with a reasoning parser hand the thinking over apart."""
    thinking = message.get("reasoning_content") or message.get("reasoning") or ""
    content = message.get("content") or ""
    return f"<think>{thinking}</think>{content}" if thinking else content


def _body(client: Client, decoding: Decoding, text: str, seed: int) -> dict[str, Any]:
    body: dict[str, Any] = {"model": client.model, "max_tokens": decoding.max_new_tokens, "temperature": decoding.temperature, "seed": seed}
    body |= {"messages": [{"role": "user", "content": text}]} if client.chat else {"prompt": text}
    if decoding.greedy:
        return body
    body["top_p"] = decoding.top_p
    if client.engine == "transformers":
        return body | {"generation_config": json.dumps(_generation_config(decoding))}
    if client.engine in ("vllm", "sglang"):
        return body | {"top_k": decoding.top_k or -1, "min_p": decoding.min_p}
    if decoding.top_k or decoding.min_p:
        raise SettingsError("A plain OpenAI server knows no top_k and no min_p; set both to 0, or name its engine (vllm, sglang).")
    return body


def _generation_config(decoding: Decoding) -> dict[str, Any]:
    """`transformers serve` samples only where a generation config says so."""
    values = {"do_sample": True, "temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": decoding.top_k}
    return values | ({"min_p": decoding.min_p} if decoding.min_p else {}) | {"max_new_tokens": decoding.max_new_tokens}


def post(client: Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The server's reply to one request; busy or unreachable servers are asked again, ever more slowly."""
    for attempt in range(client.retries + 1):
        try:
            return json.loads(_open(client, path, body))
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace").strip()[:300]
            if error.code not in _TRANSIENT:
                raise DeviceError(f"{client.base_url} refused the request ({error.code}): {said}") from None
            reason = f"status {error.code}: {said}"
        except (OSError, ValueError) as error:  # refused, reset, timed out, cut off
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        if attempt < client.retries:
            time.sleep(min(30.0, 0.5 * 2**attempt))
    raise DeviceError(f"{client.base_url} did not answer ({reason}), asked {client.retries + 1} times; see that it runs, then start again.")


def _open(client: Client, path: str, body: dict[str, Any]) -> bytes:
    headers = {"Content-Type": "application/json"}
    if client.key_variable:
        headers["Authorization"] = f"Bearer {_key(client.key_variable)}"
    request = urllib.request.Request(client.base_url.rstrip("/") + path, json.dumps(body).encode(), headers)
    with _opener(client.base_url).open(request, timeout=client.timeout) as reply:
        return reply.read()


def _key(variable: str) -> str:
    if variable not in os.environ:
        raise SettingsError(f"The environment variable {variable}, which should hold the server's key, is not set.")
    return os.environ[variable]


def _opener(url: str) -> urllib.request.OpenerDirector:
    """This machine is never reached through a proxy."""
    here = urlparse(url).hostname in ("localhost", "127.0.0.1", "::1")
    return urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if here else []))


def refuse_latent(model: str) -> None:
    """SettingsError for a folder that holds a model which thinks between words: a server would run one plain pass, and say nothing."""
    folder = Path(model)
    if not folder.is_dir():
        return
    method = _method(folder)
    if method != "none":
        raise SettingsError(
            f"{model} is a checkpoint of method {method}: a server would run its backbone one pass a token, without its thoughts. "
            "Evaluate it with the backend of its method (lab.backends.Latent)."
        )


def _method(folder: Path) -> str:
    from lab.models.latent_model import MANIFEST, read_manifest
    from lab.models.layouts import FolderFiles, recognise

    if (folder / MANIFEST).exists():
        return read_manifest(folder)["method"]
    if (folder / "tah_config.json").exists():
        return "tah"
    with contextlib.suppress(CheckpointError):  # nothing that we know: the server will say what it thinks of it
        return recognise(FolderFiles(folder))[1].method
    return "none"


@contextlib.contextmanager
def serve(
    model: str, engine: Engine = "transformers", tp_size: int = 1, *, options: Sequence[str] = (), wait: float = 900.0, **client: Any
) -> Iterator[Client]:
    """A server of our own for the length of a `with` block, and how to ask it.

    Args:
        model: folder or hub id. tp_size: devices the model is spread over (vllm, sglang).
        options: further words of the engine's command line. wait: seconds to wait for it. client: further fields of `Client`.
    Raises DeviceError if the engine is not installed, dies or does not get ready.
    """
    refuse_latent(model)
    port = _free_port()
    command = _command(engine, model, tp_size, port) + list(options)
    with tempfile.NamedTemporaryFile("w+", prefix=f"{engine}-", suffix=".log") as output:
        log.info("Starting %s", " ".join(command))
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            base = f"http://127.0.0.1:{port}"
            _await(base, process, output.name, wait)
            yield Client.check(base_url=base, model=model, engine=engine, **client)
        finally:
            stop_group(process)


def _command(engine: str, model: str, tp_size: int, port: int) -> list[str]:
    if engine not in _INSTALL:
        raise unknown("engine to start", engine, _INSTALL)
    if engine == "transformers" and tp_size > 1:
        raise SettingsError(f"transformers serve runs on one device; for tp_size {tp_size} choose the engine vllm or sglang.")
    beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    needs = {"transformers": ("fastapi", "uvicorn", "openai"), "vllm": ("vllm",), "sglang": ("sglang",)}[engine]
    program = sys.executable if engine == "sglang" else shutil.which(engine, path=beside)
    if program is None or not all(map(_installed, needs)):
        raise DeviceError(f"The engine {engine} is not installed here; run: {_INSTALL[engine]}")
    if engine == "sglang":
        return [
            program,
            "-m",
            "sglang.launch_server",
            "--model-path",
            model,
            "--tp",
            str(tp_size),
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
        ]
    spread = ["--tensor-parallel-size", str(tp_size)] if engine == "vllm" else []
    return [program, "serve", model, "--host", "127.0.0.1", "--port", str(port), *spread]


def _installed(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None


def _await(base: str, process: subprocess.Popen, output: str, wait: float) -> None:
    """Returns when the server says it is well."""
    end = time.monotonic() + wait
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError), _opener(base).open(f"{base}/health", timeout=5):
            return
        time.sleep(0.3)
    state = "did not get ready in time" if process.poll() is None else f"ended with status {process.returncode}"
    last = "\n".join(Path(output).read_text(errors="replace").splitlines()[-15:])
    raise DeviceError(f"The server {state}. Its last lines:\n{last}")


def _free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]
