"""A contact sheet: pictures in rows, with lines of text below each."""

from collections.abc import Sequence
from functools import lru_cache

from matplotlib import font_manager, ft2font
from PIL import Image, ImageDraw, ImageFont

from cnns.errors import printable
from cnns.report.examples import SIDE
from cnns.report.plots import installed_fonts

COLUMNS, MARGIN, LINE_HEIGHT, FONT_SIZE = 6, 8, 16, 12
NOT_DRAWN = "?"  # in place of a character that no font here has
DAMAGED = "damaged picture"

Font = ImageFont.FreeTypeFont


@lru_cache(1)
def load_fonts() -> list[tuple[Font, frozenset[int]]]:
    """Fonts, and the characters that each has."""
    paths = [font_manager.findfont(name) for name in installed_fonts()]
    return [
        (ImageFont.truetype(path, FONT_SIZE), frozenset(ft2font.FT2Font(path).get_charmap()))
        for path in paths
    ]


def choose_font(text: str) -> tuple[Font, str]:
    """A font that has the whole text, else the one with most of it; and what it can draw."""

    def can_draw(text: str, held: frozenset[int]) -> list[bool]:
        return [ord(character) in held for character in text]

    font, held = max(load_fonts(), key=lambda font: sum(can_draw(text, font[1])))
    drawn = zip(text, can_draw(text, held), strict=True)
    return font, "".join(character if can else NOT_DRAWN for character, can in drawn)


def write_line(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, colour: str) -> None:
    font, text = choose_font(printable(text))
    if draw.textlength(text, font) > SIDE:
        while text and draw.textlength(text + "…", font) > SIDE:
            text = text[:-1]
        text += "…"
    draw.text(place, text, colour, font)


def draw_sheet(cells: Sequence[tuple[Image.Image | None, Sequence[str]]]) -> Image.Image:
    """Pictures, None where one is damaged, each with as many lines of text as the first."""
    columns = min(COLUMNS, len(cells))
    height = SIDE + LINE_HEIGHT * len(cells[0][1]) + 2 * MARGIN
    rows = -(-len(cells) // columns)
    size = columns * (SIDE + MARGIN) + MARGIN, rows * height
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for i, (picture, lines) in enumerate(cells):
        left, top = MARGIN + i % columns * (SIDE + MARGIN), MARGIN + i // columns * height
        if picture is None:
            draw.rectangle((left, top, left + SIDE, top + SIDE), "#dddddd")
            write_line(draw, (left + MARGIN, top + MARGIN), DAMAGED, "black")
        else:
            place = left + (SIDE - picture.width) // 2, top + (SIDE - picture.height) // 2
            sheet.paste(picture, place)
        for number, line in enumerate(lines):
            colour = "black" if number == 0 else "#b00000"
            write_line(draw, (left, top + SIDE + 2 + LINE_HEIGHT * number), line, colour)
    return sheet
