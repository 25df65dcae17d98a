"""The docs' pictures: made by their script, and no text outside of the picture or over other text."""

import importlib.util
import re
from pathlib import Path

import pytest

IMAGES = Path(__file__).parents[1] / "docs" / "images"
TEXT = re.compile(r'<text x="(\d+)" y="(\d+)"[^>]*text-anchor="(\w+)"[^>]*data-width="(\d+)">([^<]*)<')


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_images", IMAGES.parent / "make_images.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pictures_are_those_of_the_script(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "HERE", tmp_path)
    script.main()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in IMAGES.glob("*.svg"))
    for path in tmp_path.iterdir():
        assert path.read_text() == (IMAGES / path.name).read_text(), "run python docs/make_images.py"


@pytest.mark.parametrize("path", sorted(IMAGES.glob("*.svg")), ids=lambda path: path.stem)
def test_text_is_inside_and_clear_of_other_text(path):
    svg = path.read_text()
    width, height = map(int, re.search(r'viewBox="0 0 (\d+) (\d+)"', svg).groups())
    spans = []
    for x, y, anchor, wide, line in TEXT.findall(svg):
        left = int(x) - (int(wide) / 2 if anchor == "middle" else 0)
        assert left >= 0 and left + int(wide) <= width and 13 <= int(y) <= height - 4, line
        spans.append((left, left + int(wide), int(y), line))
    assert len(spans) == svg.count("<text ") > 5
    for i, (left, right, y, line) in enumerate(spans):
        for other_left, other_right, other_y, other in spans[:i]:
            assert abs(y - other_y) >= 15 or right <= other_left or other_right <= left, (line, other)


def test_the_measure_is_not_narrower_than_real_fonts(script):
    """DejaVu Sans is the widest of the fonts that a browser takes for these pictures."""
    pytest.importorskip("matplotlib")
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    for path in IMAGES.glob("*.svg"):
        for *_, wide, line in TEXT.findall(path.read_text()):
            real = TextPath((0, 0), line, size=script.SIZE, prop=FontProperties(family="DejaVu Sans")).get_extents()
            assert real.width <= int(wide) + 1, line
