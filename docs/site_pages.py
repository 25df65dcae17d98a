"""README, CONTRIBUTING and CHANGELOG as pages of the site: a hook of mkdocs, for `make docs`.

They lie beside the docs, so that a checkout shows them first. Links to and from them are rewritten for the site, and so
is what only GitHub's Markdown takes: a second word that says what a code block is.
"""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BESIDE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def for_site(markdown: str) -> str:
    """Links as they are on the site, where all pages lie in one folder; of those to other files the words stay."""
    markdown = re.sub(r"^```(\w+) .*$", r"```\1", markdown, flags=re.MULTILINE)
    markdown = re.sub(r"\[([^\]]+)\]\(\.\./(?![A-Z]+\.md)[^)]+\)", r"\1", markdown)
    markdown = re.sub(r"\]\((?:\.\./|docs/)", "](", markdown)
    return re.sub(r"\]\(([A-Z]+\.md)", lambda link: f"]({BESIDE[link[1]]}", markdown)


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for source, page in BESIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return for_site(markdown)
