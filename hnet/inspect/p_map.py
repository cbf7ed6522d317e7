"""Boundary probabilities over the bytes of several texts, as one image."""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hnet.inspect.segmentation import Segmentation
from hnet.printable import printable

MOST_BYTES = 256
MOST_TEXTS = 32
_CELL = (12, 4)  # height and width of one probability, in pixels
_GAP = 2
_BLUE = np.array([0, 114, 178], np.float64)  # Okabe-Ito
_LABEL = 150  # width of the labels left of the rows, in pixels
_SCALE = 14  # height of the scale above the rows, in pixels
_TICK = 32  # bytes per tick of the scale
_INK = (40, 40, 40)


def labelled_p_map(texts: Mapping[int, Segmentation], stage: int) -> np.ndarray:
    """`p_map` with the number and name of each text and a byte scale, uint8 (H, W, 3)."""
    pixels = p_map(list(texts.values()), stage)
    height, width, _ = pixels.shape
    image = Image.new("RGB", (_LABEL + width, _SCALE + height), "white")
    image.paste(Image.fromarray(pixels), (_LABEL, _SCALE))
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size=10)
    for row, (number, seg) in enumerate(list(texts.items())[:MOST_TEXTS]):
        label = _fitting(f"{number:02} {_drawable(seg.name)}", font)
        pen.text((2, _SCALE + row * _CELL[0] - 1), label, _INK, font)
    for byte in range(0, width // _CELL[1], _TICK):
        x = _LABEL + byte * _CELL[1]
        pen.line((x, _SCALE - 4, x, _SCALE - 1), _INK)
        pen.text((x + 2, 0), f"byte {byte}", _INK, font)
    return np.asarray(image)


def _drawable(name: str) -> str:
    """Replace characters that the built-in font lacks (above U+00FF) by "?"."""
    return "".join(c if c <= "\u00ff" else "?" for c in printable(name))


def _fitting(label: str, font: ImageFont.FreeTypeFont) -> str:
    """The label, shortened in the middle if it is too long: names differ most at their ends."""
    if font.getlength(label) <= _LABEL - 6:
        return label
    kept = len(label)
    while kept > 1:
        kept -= 1
        short = label[: (kept + 1) // 2] + "..." + label[len(label) - kept // 2 :]
        if font.getlength(short) <= _LABEL - 6:
            break
    return short


def p_map(segmentations: Sequence[Segmentation], stage: int) -> np.ndarray:
    """Boundary probabilities of `stage` over the first bytes of texts, uint8 (height, width, 3).

    One row per text, from white (0) to blue (1), grey after the end of the text. An inner stage has
    one position per chunk of the next outer stage; its p fills that chunk.
    """
    rows = [_p_of_bytes(seg, stage) for seg in segmentations[:MOST_TEXTS]]
    width = max(len(row) for row in rows)
    image = np.full((len(rows), width, 3), 200, np.uint8)
    for pixels, p in zip(image, rows):
        pixels[: len(p)] = (255 + p[:, None] * (_BLUE - 255)).round()
    image = image.repeat(_CELL[0], axis=0).repeat(_CELL[1], axis=1)
    rows_RHWC = image.reshape(len(rows), _CELL[0], -1, 3)
    rows_RHWC[:, -_GAP:] = 255  # a white line between texts
    return image


def _p_of_bytes(seg: Segmentation, stage: int) -> np.ndarray:
    """p of the position that each of the first bytes belongs to, (bytes,)."""
    count = min(len(seg.data), MOST_BYTES)
    position = np.searchsorted(seg.positions(stage), np.arange(count), side="right") - 1
    return np.asarray(seg.stages[stage].probs)[position]
