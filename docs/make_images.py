"""The pictures of the docs: `python docs/make_images.py`. Boxes are as wide as their text in the widest common font.

Text is measured, not guessed: `box` takes the lines and finds its own size, and `tests/test_images.py` holds every line
inside its box, in the picture, and clear of other boxes' text.
"""

from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent / "images"
SIZE, LINE, PAD = 13, 18, 10
_WIDEST = 0.66  # of the font size: a letter of DejaVu Sans and Verdana, on average
_INK, _BLUE, _GREEN, _ORANGE = "#1c1f24", "#0072b2", "#00795a", "#b34700"


def width_of(text: str, bold: bool = False) -> float:
    return len(text) * SIZE * _WIDEST * (1.08 if bold else 1.0)


@dataclass
class Picture:
    width: int
    height: int
    title: str
    parts: list[str] = field(default_factory=list)

    def text(
        self, x: float, y: float, line: str, colour: str = _INK, bold: bool = False, anchor: str = "start"
    ) -> None:
        """anchor: start or middle. `data-width` is what the test measures with."""
        weight = ' font-weight="bold"' if bold else ""
        self.parts.append(
            f'<text x="{x:.0f}" y="{y:.0f}" fill="{colour}" text-anchor="{anchor}"{weight} '
            f'data-width="{width_of(line, bold):.0f}">{line}</text>'
        )

    def box(
        self, x: float, y: float, lines: list[str], colour: str = _INK, *, dash: bool = False
    ) -> tuple[float, float]:
        """A box at (x, y) around its lines, the first bold; where it ends: (right, bottom)."""
        wide = max(width_of(line, i == 0) for i, line in enumerate(lines)) + 2 * PAD
        high = LINE * len(lines) + PAD
        dashes = ' stroke-dasharray="5 3"' if dash else ""
        self.parts.append(
            f'<rect x="{x:.0f}" y="{y:.0f}" width="{wide:.0f}" height="{high:.0f}" rx="6" fill="#ffffff" '
            f'stroke="{colour}" stroke-width="1.5"{dashes}/>'
        )
        for i, line in enumerate(lines):
            self.text(x + wide / 2, y + PAD / 2 + LINE * (i + 0.75), line, colour, i == 0, "middle")
        return x + wide, y + high

    def frame(self, x: float, y: float, wide: float, high: float, name: str) -> None:
        self.parts.append(
            f'<rect x="{x:.0f}" y="{y:.0f}" width="{wide:.0f}" height="{high:.0f}" rx="8" '
            'fill="#f4f6f8" stroke="#8a8f98"/>'
        )
        self.text(x + PAD, y + LINE, name, bold=True)

    def arrow(self, path: str, colour: str = _INK) -> None:
        self.parts.append(
            f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2.5" marker-end="url(#to{colour[1:]})"/>'
        )

    def save(self, name: str) -> None:
        heads = "".join(
            f'<marker id="to{c[1:]}" markerWidth="9" markerHeight="9" refX="7" refY="4" orient="auto" '
            f'markerUnits="userSpaceOnUse"><path d="M0 0 L8 4 L0 8 z" fill="{c}"/></marker>'
            for c in (_INK, _BLUE, _GREEN, _ORANGE)
        )
        body = "\n  ".join(self.parts)
        (HERE / name).write_text(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" role="img" '
            f'aria-label="{self.title}" font-family="Verdana, DejaVu Sans, Arial, sans-serif" font-size="{SIZE}">\n'
            f'  <defs>{heads}</defs>\n  <rect width="{self.width}" height="{self.height}" fill="#ffffff"/>\n'
            f"  {body}\n</svg>\n"
        )


def two_speeds() -> None:
    picture = Picture(960, 440, "Reorder, keep and fetch: three ways to even out the ranks")
    for node, x in enumerate((20, 490)):
        picture.frame(x, 20, 450, 190, f"node {node}")
    hot, _ = picture.box(40, 60, ["expert 0", "hot, at home"], _ORANGE)
    picture.box(40, 145, ["expert 0", "fetched copy"], _GREEN, dash=True)
    moved, _ = picture.box(280, 60, ["expert 1", "home before"])
    picture.box(530, 60, ["expert 1", "home in this batch"])
    picture.box(530, 145, ["expert 0", "kept copy"], _BLUE, dash=True)
    picture.box(780, 60, ["expert 2", "cold, at home"], _ORANGE)
    picture.arrow("M90 108 V141", _GREEN)
    picture.arrow(f"M{hot + 2:.0f} 90 C230 150 300 170 526 170", _BLUE)
    picture.arrow(f"M{moved + 2:.0f} 84 H526", _INK)
    rows = (
        (_INK, "reorder", "once a batch: an expert changes its home, with its optimizer state"),
        (_BLUE, "keep", "once a batch: a copy on any node; its gradient comes home once, at the end"),
        (_GREEN, "fetch", "every micro-batch and layer: a copy inside the node, over the fast network"),
    )
    for i, (colour, name, words) in enumerate(rows):
        y = 250 + 45 * i
        right, _ = picture.box(20, y, [name], colour)
        picture.text(max(right, 110) + 16, y + 18, words, colour)
    picture.text(
        20, 405, "The routing of the whole batch is known before the step, so the planner can price all three:"
    )
    picture.text(20, 425, "it takes what makes the step shortest, and nothing where nothing pays.")
    picture.save("two_speeds.svg")


def chain(name: str, title: str, stations: list[list[str]], back: str) -> None:
    """Stations from left to right in rows of three, and what comes back under them."""
    picture = Picture(960, 300, title)
    for i, lines in enumerate(stations):
        x, y = 20 + 320 * (i % 3), 20 + 120 * (i // 3)
        right, bottom = picture.box(x, y, lines, (_BLUE, _GREEN)[i // 3])
        if i + 1 < len(stations):
            across, down = f"M{right + 2:.0f} {y + 32} H{x + 314}", f"M{x + 60} {bottom:.0f} V{y + 98} H80 V{y + 114}"
            picture.arrow(across if i % 3 < 2 else down)
    picture.text(20, 270, back)
    picture.save(name)


def main() -> None:
    two_speeds()
    chain(
        "way_of_a_token.svg",
        "The way of a token through one layer",
        [
            ["router", "replays recorded experts"],
            ["tables", "rank and slot, on the device"],
            ["dispatch", "once to each rank it needs"],
            ["experts", "grouped GEMMs over slots"],
            ["combine", "each rank returns one sum"],
            ["sum", "in the order of its experts"],
        ],
        "Backward takes the same way: dx and the gate weights' gradients return in one payload.",
    )
    chain(
        "way_of_weights.svg",
        "The way of an expert's weights in one batch",
        [
            ["home", "parameters, optimizer state"],
            ["move", "before the batch, if it pays"],
            ["copy", "for a batch, or for a layer"],
            ["compute", "copy takes its quota of rows"],
            ["gradient", "fp32, in a fixed order"],
            ["home again", "optimizer steps there only"],
        ],
        "Copies are no parameters: no optimizer, state dict or checkpoint ever sees them.",
    )


if __name__ == "__main__":
    main()
