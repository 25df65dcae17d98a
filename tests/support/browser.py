"""Pages as a browser shows them: Chromium, from the system's packages (`apt-get install chromium`).

Where there is none a test that needs it is skipped with a line that says so; `RELIBRA_BROWSER=required`, as the nightly
gates set it, makes it a failure.
"""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def chromium() -> str:
    """The browser's path."""
    found = next((path for path in map(shutil.which, _NAMES) if path), None)
    if found is None:
        if os.environ.get("RELIBRA_BROWSER") == "required":
            pytest.fail("RELIBRA_BROWSER is required, but there is no Chromium here: apt-get install chromium")
        pytest.skip("NOT LOOKED AT: there is no Chromium here (apt-get install chromium)")
    return found


def measured(browser: str, page: Path, script: str) -> object:
    """What a script makes of a page once it is laid out; the script ends by returning something that JSON can hold."""
    body = page.read_text()
    written = f"document.body.textContent = 'RESULT' + JSON.stringify((() => {{{script}}})()) + 'END'"
    asking = page.with_name(f"asking_{page.stem}.html")
    asking.write_text(f"<!doctype html><meta charset=utf-8><body>{body}<script>{written}</script></body>")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    done = subprocess.run([*command, asking.as_uri()], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    return json.loads(html.unescape(re.search(r"<body>RESULT(.*?)END", done.stdout, re.DOTALL)[1]))


def screenshot(browser: str, page: Path, picture: Path, width: int, *options: str, height: int = 900) -> np.ndarray:
    """uint8 [height, width, 3] of a file in a window of that size. Fails where the page logs an error."""
    from matplotlib.image import imread

    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    size = f"--window-size={width},{height}"
    done = subprocess.run(
        [*command, *options, size, f"--screenshot={picture}", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert picture.exists(), done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    return (imread(picture)[..., :3] * 255).astype(np.uint8)
