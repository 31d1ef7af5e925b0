"""The demo's two pictures: the grid of what was generated, and the bit maps side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .plan import BitPlan, block_labels, colours

INK = (32, 33, 36)
GREY = (110, 113, 120)
EDGE = (222, 224, 228)

_MARGIN = 20
_GAP = 18


@dataclass(frozen=True)
class Tile:
    """One generated picture, what stands below it, and how its activations' widths are distributed.

    Args:
        picture: as the pipeline gave it.
        label: one short line.
        shares: width in bits -> share of layers and steps, summing to 1.
    """

    picture: Image.Image
    label: str
    shares: dict[int, float]


@dataclass(frozen=True)
class Caption:
    """What stands beside a row: the prompt and, smaller, what is known of it."""

    prompt: str
    notes: tuple[str, ...] = ()


class PictureGrid:
    """A row for each prompt, a column for each setting.

    Args:
        headers: a title and a smaller second line for each of C columns.
        captions: R captions.
        tiles: R rows of C tiles.
    """

    side = 160
    caption_width = 208
    header_height = 58
    row_height = side + 56
    footer_height = 40

    def __init__(
        self,
        headers: Sequence[tuple[str, str]],
        captions: Sequence[Caption],
        tiles: Sequence[Sequence[Tile]],
    ) -> None:
        self.headers, self.captions, self.tiles = headers, captions, tiles

    def box(self, row: int, column: int) -> tuple[int, int, int, int]:
        """Where a picture stands: left, top, right, bottom."""
        left = _MARGIN + self.caption_width + _GAP + column * (self.side + _GAP)
        top = self.header_height + row * self.row_height
        return left, top, left + self.side, top + self.side

    def image(self) -> Image.Image:
        """The grid as one RGB picture."""
        right, bottom = self.box(len(self.captions) - 1, len(self.headers) - 1)[2:]
        bottom += self.row_height - self.side
        image = Image.new("RGB", (right + _MARGIN, bottom + self.footer_height), "white")
        draw = ImageDraw.Draw(image)
        for column, (title, detail) in enumerate(self.headers):
            left = self.box(0, column)[0]
            draw.text((left, 12), title, INK, _font(17))
            draw.text((left, 34), detail, GREY, _font(13))
        for row, caption in enumerate(self.captions):
            self._caption(draw, row, caption)
            for column, tile in enumerate(self.tiles[row]):
                self._tile(image, draw, self.box(row, column), tile)
        self._legend(draw, bottom)
        return image

    def _caption(self, draw: ImageDraw.ImageDraw, row: int, caption: Caption) -> None:
        top = self.box(row, 0)[1]
        notes = [line for note in caption.notes for line in wrapped(note, _font(13), self.caption_width)]
        room = (self.side - 18 * len(notes)) // 20
        for line in wrapped(caption.prompt, _font(15), self.caption_width, room):
            draw.text((_MARGIN, top), line, INK, _font(15))
            top += 20
        for line in notes:
            draw.text((_MARGIN, top + 4), line, GREY, _font(13))
            top += 18

    def _tile(
        self, image: Image.Image, draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], tile: Tile
    ) -> None:
        left, top, right, bottom = box
        image.paste(enlarged(tile.picture, self.side), (left, top))
        draw.rectangle((left - 1, top - 1, right, bottom), outline=EDGE)
        _share_bar(draw, (left, bottom + 6), self.side, tile.shares)
        draw.text((left, bottom + 19), tile.label, INK, _font(14))

    def _legend(self, draw: ImageDraw.ImageDraw, top: int) -> None:
        widths = {bits for row in self.tiles for tile in row for bits in tile.shares}
        left = self.box(0, 0)[0]
        draw.text((_MARGIN, top + 6), "bits of the activations", GREY, _font(13))
        draw_legend(draw, (left, top + 6), sorted(widths))


def enlarged(picture: Image.Image, side: int) -> Image.Image:
    """The picture at `side` x `side`."""
    return picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)


class BitMaps:
    """The widths of every prompt of a plan, layers down and steps across, four prompts a row.

    Args:
        plan: P prompts.
        titles: for each prompt a caption; its notes stand below the prompt.
    """

    columns = 4
    panel_width = 208
    title_height = 84
    cell_height = 7

    def __init__(self, plan: BitPlan, titles: Sequence[Caption]) -> None:
        self.plan, self.titles = plan, titles
        self.labels = block_labels(plan.layers)
        self.label_width = max(int(_font(12).getlength(label)) for _, label in self.labels) + 10
        # Whole pixels for each step, so that no step is drawn wider than another.
        self.cell_width = max(1, self.panel_width // len(plan.timesteps))
        self.map_size = (self.cell_width * len(plan.timesteps), self.cell_height * len(plan.layers))

    def corner(self, prompt: int) -> tuple[int, int]:
        """Left and top of a prompt's map."""
        row, column = divmod(prompt, self.columns)
        right, down = self._pitch()
        return _MARGIN + self.label_width + column * right, 14 + self.title_height + row * down

    def image(self) -> Image.Image:
        """The maps as one RGB picture."""
        right, down = self._pitch()
        across = min(self.columns, self.plan.prompts)
        width = self.corner(0)[0] + across * right - _GAP + _MARGIN
        bottom = 14 + -(-self.plan.prompts // self.columns) * down
        image = Image.new("RGB", (width, bottom + 30), "white")
        draw = ImageDraw.Draw(image)
        for prompt in range(self.plan.prompts):
            left, top = self.corner(prompt)
            self._title(draw, self.titles[prompt], (left, top - self.title_height))
            self._map(image, draw, prompt, (left, top))
            if prompt % self.columns == 0:
                self._layer_labels(draw, top)
        draw.text((_MARGIN, bottom), "bits", GREY, _font(13))
        draw_legend(draw, (self.corner(0)[0], bottom), sorted(int(bits) for bits in self.plan.bits.unique()))
        return image

    def _pitch(self) -> tuple[int, int]:
        """From one map to the next: to the right, and down."""
        width, height = self.map_size
        return max(width, self.panel_width) + _GAP, self.title_height + height + 34

    def _title(self, draw: ImageDraw.ImageDraw, caption: Caption, corner: tuple[int, int]) -> None:
        left, top = corner
        room = (self.title_height - 8 - 18 * len(caption.notes)) // 18
        for line in wrapped(caption.prompt, _font(14), self.panel_width, room):
            draw.text((left, top), line, INK, _font(14))
            top += 18
        for note in caption.notes:
            draw.text((left, top), note, GREY, _font(13))
            top += 18

    def _map(
        self, image: Image.Image, draw: ImageDraw.ImageDraw, prompt: int, corner: tuple[int, int]
    ) -> None:
        left, top = corner
        width, height = self.map_size
        cells = Image.fromarray(colours(self.plan.bits[prompt].T.numpy()))
        image.paste(cells.resize(self.map_size, Image.Resampling.NEAREST), (left, top))
        for row, _ in self.labels[1:]:
            y = top + row * self.cell_height
            draw.line((left, y, left + width - 1, y), fill="white")
        draw.text((left, top + height + 4), "first step", GREY, _font(12))
        draw.text((left + width, top + height + 4), "last step", GREY, _font(12), anchor="ra")

    def _layer_labels(self, draw: ImageDraw.ImageDraw, top: int) -> None:
        for row, label in self.labels:
            draw.text((_MARGIN, top + row * self.cell_height), label, GREY, _font(12))


def draw_legend(draw: ImageDraw.ImageDraw, corner: tuple[int, int], widths: Sequence[int]) -> None:
    """A coloured square and a number for each width."""
    left, top = corner
    for bits in widths:
        draw.rectangle((left, top + 2, left + 13, top + 15), fill=_colour(bits), outline=EDGE)
        draw.text((left + 19, top), str(bits), INK, _font(13))
        left += 56


def _share_bar(
    draw: ImageDraw.ImageDraw, corner: tuple[int, int], width: int, shares: dict[int, float]
) -> None:
    left, top = corner
    passed = 0.0
    for bits, share in sorted(shares.items()):
        start, passed = round(passed * width), passed + share
        draw.rectangle(
            (left + start, top, left + max(start, round(passed * width) - 1), top + 8), _colour(bits)
        )
    draw.rectangle((left - 1, top - 1, left + width, top + 9), outline=EDGE)


def _colour(bits: int) -> tuple[int, int, int]:
    red, green, blue = colours(np.array([[bits]], dtype=np.uint8))[0, 0].tolist()
    return red, green, blue


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # what a given size gives
    return font


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: int, most: int | None = None) -> list[str]:
    """A text in lines of at most `width` pixels; with `most` lines, what goes beyond ends in an ellipsis."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    if most is not None and len(lines) > most:
        lines = lines[:most]
        lines[-1] += " …"
    return [_cut(line, font, width) for line in lines]


def _cut(line: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(f"{line}…") > width:
        line = line[:-1]
    return f"{line}…"
