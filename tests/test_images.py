"""The docs' pictures: made by their script, and no text outside of the picture or over other text."""

import importlib.util
import re
from pathlib import Path

import pytest
from browser import chromium, measured

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


BOXES = """
const box = (e) => { const b = e.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom] };
const svg = document.querySelector('svg');
return {
  picture: box(svg),
  texts: [...svg.querySelectorAll('text')].map((t) => [t.textContent, box(t)]),
  boxes: [...svg.querySelectorAll('rect')].map(box),
};
"""
FONTS = ("", "Verdana", "Arial")  # "": the picture's own list


def overlap(one, other):
    return min(one[2], other[2]) - max(one[0], other[0]) > 0 and min(one[3], other[3]) - max(one[1], other[1]) > 0


def inside(one, other, slack=0.5):
    return all(a >= b - slack for a, b in zip(one[:2], other[:2], strict=True)) and all(
        a <= b + slack for a, b in zip(one[2:], other[2:], strict=True)
    )


@pytest.mark.parametrize("font", FONTS)
@pytest.mark.parametrize("name", sorted(path.name for path in IMAGES.glob("*.svg")))
def test_a_browser_draws_text_inside_its_boxes(name, font, tmp_path):
    """As it lays out the picture in the fonts that it has: no text over text, over an edge, or out of the picture."""
    svg = (IMAGES / name).read_text().replace("<svg ", '<svg width="960" ', 1)
    if font:
        svg = re.sub(r'font-family="[^"]*"', f'font-family="{font}, sans-serif"', svg)
    (tmp_path / name).write_text(svg)
    found = measured(chromium(), tmp_path / name, BOXES)
    assert len(found["texts"]) == svg.count("<text ") and len(found["boxes"]) == svg.count("<rect ")
    for i, (text, place) in enumerate(found["texts"]):
        assert place[2] - place[0] > 5 and inside(place, found["picture"]), text
        assert not [other for other, box in found["texts"][:i] if overlap(place, box)], text
        assert all(inside(place, box) or not overlap(place, box) for box in found["boxes"]), text


def test_what_measures_sees_text_that_leaves_its_box(tmp_path):
    """The picture as it would be in a font twice as wide."""
    svg = (IMAGES / "two_speeds.svg").read_text().replace("<svg ", '<svg width="960" ', 1)
    (tmp_path / "wide.svg").write_text(svg.replace('font-size="13"', 'font-size="26"'))
    found = measured(chromium(), tmp_path / "wide.svg", BOXES)
    crossing = [t for t, p in found["texts"] if any(overlap(p, b) and not inside(p, b) for b in found["boxes"])]
    assert len(crossing) > 3
