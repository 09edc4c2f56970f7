"""Makes the README's picture: the token view of a run's explore step, as a browser shows it.

python benchmarks/picture.py outputs/tah/demo-toy papers/tah/tokens.png
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from lab.runs import open_run
from lab.view.base import document


def main(run: str, picture: str) -> None:
    (view,) = [path for record in open_run(run).steps() for path in record.files("views", "tokens.html")]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 860, "height": 600}, device_scale_factor=2)
        page.set_content(document("tokens", view.read_text(), "light"))
        page.locator(".lab-view").screenshot(path=Path(picture))
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
