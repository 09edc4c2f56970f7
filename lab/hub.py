"""Whether the Hugging Face hub can be asked at all, found out in seconds instead of minutes of retries."""

import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

TIMEOUT_S = 3.0


def local_only(name: str) -> bool:
    """Whether `name` must come from this machine: it is a path here, the hub is switched off, or the hub does not answer."""
    return Path(name).expanduser().exists() or not reachable()


def reachable() -> bool:
    """Whether the hub answers; taken on trust behind a proxy, which alone knows the way."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    address = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        socket.create_connection((address.hostname or "", address.port or 443), TIMEOUT_S).close()
    except OSError:
        return False
    return True
