"""A real Chromium, driven through playwright, that cannot reach anything but this machine."""

import os
import re
import shutil
from pathlib import Path

import pytest

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
PATIENCE_MS = 180_000
WAYS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="session")
def chromium():
    """The browser, or a skip that says how to install it."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[test]'")
    path = next(filter(None, map(shutil.which, WAYS)), None)
    if path is None:
        pytest.skip("no Chromium on PATH: apt-get install -y chromium (or brew install --cask chromium)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS, timeout=PATIENCE_MS)
        yield browser
        browser.close()


class Tab:
    """A page, what its console said, and which requests it tried to make beyond this machine."""

    def __init__(self, context, folder):
        self.page, self.errors, self.outside, self.folder = context.new_page(), [], [], folder
        self.page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", self._noted)

    def _noted(self, request):
        if not re.match(r"(file|data|blob|about|ws|http)://(127\.0\.0\.1|localhost|/)|data:|blob:|about:", request.url):
            self.outside.append(request.url)

    def shot(self, name):
        """Keeps a picture of the whole page."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=self.folder / f"{name}.png", full_page=True)

    def clean(self):
        assert self.errors == [] and self.outside == []


@pytest.fixture
def tab(chromium, tmp_path, request):
    """tab(theme, width, offline) opens a page; at the end no tab may have logged an error or reached outside."""
    folder = Path(os.environ.get("LAB_SCREENSHOTS") or tmp_path / "screenshots")
    contexts, tabs = [], []

    def opened(theme="light", width=1000, offline=True, script=True):
        context = chromium.new_context(
            color_scheme=theme, viewport={"width": width, "height": 800}, offline=offline, java_script_enabled=script
        )
        context.set_default_timeout(PATIENCE_MS)
        contexts.append(context)
        tabs.append(Tab(context, folder))
        return tabs[-1]

    yield opened
    for one in tabs:
        one.clean()
    for context in contexts:
        context.close()
