"""Frozen glyphs: the vector of a byte is an image of it, rendered from a font file."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hnet.bounds import Bounds
from hnet.errors import ConfigError, shown
from hnet.nn.embeddings.bytes import Bytes
from hnet.nn.embeddings.part import EmbeddingConfig
from hnet.nn.parameters import parameter, set_frozen


@lru_cache(maxsize=8)
def glyph_images(font: str, size: int) -> np.ndarray:
    """Images of the 256 byte values, float32 (256, size, size) in [0, 1].

    A visible ASCII character is drawn as itself, any other byte as its two hexadecimal digits.
    Raises ConfigError for a file that is no font, and for two bytes with the same image.
    """
    from PIL import Image, ImageDraw, ImageFont

    def of_size(points):
        return ImageFont.truetype(font, points) if font else ImageFont.load_default(points)

    try:
        one, two = of_size(round(0.8 * size)), of_size(round(0.6 * size))
    except (OSError, ValueError) as e:
        raise ConfigError(f"model.embedding.font={shown(font)} cannot be read: {e}") from None
    images = np.zeros((256, size, size), np.float32)
    for byte in range(256):
        is_visible = 0x20 < byte < 0x7F
        image = Image.new("L", (size, size))
        text, drawn = (chr(byte), one) if is_visible else (f"{byte:02X}", two)
        ImageDraw.Draw(image).text((size / 2, size / 2), text, 255, drawn, anchor="mm")
        images[byte] = np.asarray(image, np.float32) / 255
    _, first = np.unique(images.reshape(256, -1), axis=0, return_index=True)
    if len(first) < 256:
        same = sorted(set(range(256)) - set(first.tolist()))[0]
        raise ConfigError(
            f"model.embedding.font={shown(font)} draws byte {same} like another at size={size}: "
            "use a larger size, or another font"
        )
    return images


@lru_cache(maxsize=8)
def glyph_table(font: str, size: int, d_model: int) -> np.ndarray:
    """The first `d_model` principal components of the images, (256, d_model), scaled to mean square
    1; zeros beyond the 255 that there are. Signs are fixed: the largest entry is positive."""
    pixels = glyph_images(font, size).reshape(256, -1).astype(np.float64)
    left, scales, _ = np.linalg.svd(pixels - pixels.mean(0), full_matrices=False)
    table = (left * scales)[:, : min(d_model, 255)]
    largest = np.take_along_axis(table, np.abs(table).argmax(0)[None], axis=0)
    table *= np.where(largest < 0, -1.0, 1.0)
    table = np.pad(table, ((0, 0), (0, d_model - table.shape[1])))
    return np.float32(table / np.sqrt(np.mean(np.square(table))))


class Glyphs(Bytes):
    """Frozen images of the bytes, as in language models with visual embeddings (arXiv 2507.04886).

    The table is drawn once, when a run begins, and is saved in its checkpoints: later nothing reads
    the font. It is frozen.
    """

    @dataclass(frozen=True)
    class Config(EmbeddingConfig):
        """Frozen images of the bytes, rendered from a font."""

        font: str = ""
        """path of a TrueType or OpenType file; empty: the font in Pillow"""
        size: Annotated[int, Bounds(8, 256)] = 16
        """height and width of the images in pixels"""

        def problem_in(self, owner):
            if owner.vocab_size == 256:
                return None
            return (
                f"vocab_size={owner.vocab_size} with embedding='glyphs', which has one image per "
                "byte value: use 256"
            )

        def read_files(self):
            glyph_images(self.font, self.size)

    def __init__(self, config, vocab_size, d_model, *, rngs: nnx.Rngs):
        self.config = config

        def read():
            return glyph_table(config.font, config.size, d_model)

        shape = jax.ShapeDtypeStruct((vocab_size, d_model), jnp.float32)
        self.embedding = parameter(jax.pure_callback(read, shape), "vocab embed")
        set_frozen(self, lambda path: True)

    @property
    def table_VD(self):
        return jax.lax.stop_gradient(self.embedding[...])
