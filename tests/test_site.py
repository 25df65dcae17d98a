"""The site of the docs has every page: `make docs` builds it."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_site_names_every_page():
    named = re.findall(r"^  - [^:]+: (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))
