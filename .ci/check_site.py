"""Dead links of the site that `make docs` built, to pages, files and anchors, and code blocks that stayed text.

`python .ci/check_site.py site`
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class _Page(HTMLParser):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.fences = 0
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value and name in ("href", "src"):
                self.links.append(value)
            elif value and name in ("id", "name"):
                self.anchors.add(value)

    def handle_data(self, data: str) -> None:
        self.fences += "```" in data


def dead_links(site: Path) -> list[str]:
    """`page: link` of each link that leads nowhere inside the site, and pages with code blocks that are none.

    Links to other sites are not followed.
    """
    pages = {path.resolve(): _Page(path) for path in sorted(site.rglob("*.html"))}
    dead = []
    for path, page in pages.items():
        if page.fences:
            dead.append(f"{path.relative_to(site.resolve())}: a code block that is shown as text")
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            folder = site if parts.path.startswith("/") else path.parent
            target = (folder / unquote(parts.path).lstrip("/")).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            there = target.is_file() and (
                not parts.fragment or target not in pages or unquote(parts.fragment) in pages[target].anchors
            )
            if not there:
                dead.append(f"{path.relative_to(site.resolve())}: {link}")
    return dead


def main(site: Path) -> int:
    found = dead_links(site)
    print("\n".join(found) if found else f"no dead link in the {len(list(site.rglob('*.html')))} pages of {site}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
