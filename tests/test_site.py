"""The site of the docs: it has every page, its links are rewritten, and what checks them finds dead ones.

`make docs`, a step of `.ci/run`, builds the site and checks every link of it.
"""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def hook():
    return module(ROOT / "docs" / "site_pages.py")


def test_the_site_names_every_page(hook):
    named = re.findall(r"^  - [^:]+: (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(named) == sorted([*(page.name for page in (ROOT / "docs").glob("*.md")), *hook.BESIDE.values()])


def test_links_on_the_site_lead_to_its_pages(hook):
    """Also those to and from README and CONTRIBUTING, which lie elsewhere in a checkout."""
    pages = {page.name: page for page in (ROOT / "docs").glob("*.md")} | {
        page: ROOT / source for source, page in hook.BESIDE.items()
    }
    links = 0
    for name, source in pages.items():
        prose = re.sub(r"^```.*?^```$|`[^`\n]*`", "`code`", hook.for_site(source.read_text()), flags=re.M | re.S)
        for target in re.findall(r"\]\(([^)#\s]+)", prose):
            if not target.startswith("https://"):
                links += 1
                assert target in pages or (ROOT / "docs" / target).exists(), f"{name}: {target}"
    assert links > 300


def test_dead_links_are_found(tmp_path):
    check = module(ROOT / ".ci" / "check_site.py")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "index.html").write_text("<h2 id=one>One</h2><a href=../>up</a><a href=#one>one</a>")
    page = "<a href=there/>a</a><a href=there/#one>b</a><a href='https://else.where'>c</a><a href=/there/>d</a>"
    (tmp_path / "index.html").write_text(page)
    assert check.dead_links(tmp_path) == [] and check.main(tmp_path) == 0
    (tmp_path / "index.html").write_text(page + "<a href=gone/>e</a><a href=there/#two>f</a><p>```python</p>")
    assert [line.split(": ")[1] for line in check.dead_links(tmp_path)] == [
        "a code block that is shown as text",
        "gone/",
        "there/#two",
    ]
    assert check.main(tmp_path) == 1
