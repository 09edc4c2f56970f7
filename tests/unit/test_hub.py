"""A machine without the hub says so in seconds; paths never ask."""

import socket
import time

import huggingface_hub.constants  # noqa: F401 - reads the environment once: now, and not what a test sets
import pytest

from lab import hub
from lab.errors import CheckpointError


@pytest.fixture
def offline(monkeypatch):
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")


def test_a_hub_that_answers_is_reachable_and_one_that_does_not_is_not(monkeypatch, offline):
    assert not hub.reachable()
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub.reachable() and not hub.local_only("owner/name")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert not hub.reachable()


def test_a_path_is_local_without_asking(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "reachable", lambda: pytest.fail("asked the hub"))
    assert hub.local_only(str(tmp_path))


def test_behind_a_proxy_the_proxy_decides(monkeypatch, offline):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:2")
    assert hub.reachable()


@pytest.mark.parametrize("what", ["load", "load_backbone", "load_tokenizer"])
def test_without_a_hub_the_error_comes_at_once(offline, tmp_path, monkeypatch, what):
    import lab

    waits = []
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(time, "sleep", waits.append)  # what the hub's own client does between its tries
    with pytest.raises(CheckpointError, match="nobody/nothing"):
        getattr(lab, what)("nobody/nothing")
    assert sum(waits) < 1
