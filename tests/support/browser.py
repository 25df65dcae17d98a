"""Pages as a browser shows them: Chromium, from the system's packages (`apt-get install chromium`).

Where there is none a test that needs it is skipped with a line that says so; `RELIBRA_BROWSER=required`, as the nightly
gates set it, makes it a failure.
"""

import os
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
