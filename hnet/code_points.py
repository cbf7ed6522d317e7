"""Properties of the characters of UTF-8 text, for arrays of bytes in NumPy or JAX.

A character is complete at the last byte of a sequence of table 3-7 of the Unicode Standard
(well-formed UTF-8). The last four bytes determine whether a character ends here and which one: a
lead byte is never a continuation byte, so the windows of one to four bytes that are well formed do
not overlap.

A table of a property is a text file: comment lines with ``#``, then one line per value with its
name and its code points in hexadecimal, ``Latin 41-5A 61-7A``.
"""

import numpy as np

PAGE_BITS = 7


def read_table(text: str, other: int) -> tuple[tuple[str, ...], np.ndarray]:
    """Names by value, and the value of every code point, uint8 (0x110000,); `other` if unlisted."""
    rows = [line.split() for line in text.splitlines() if not line.startswith("#")]
    value_of = np.full(0x110000, other, np.uint8)
    for value, (_, *ranges) in enumerate(rows):
        for bounds in ranges:
            first, _, last = bounds.partition("-")
            value_of[int(first, 16) : int(last or first, 16) + 1] = value
    return tuple(name for name, *_ in rows), value_of


def pages(value_of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(page number of each block of 128 code points, the distinct pages concatenated)."""
    numbers: dict[bytes, int] = {}
    rows = value_of.reshape(-1, 1 << PAGE_BITS)
    page_of = [numbers.setdefault(row.tobytes(), len(numbers)) for row in rows]
    return np.array(page_of, np.uint32), np.frombuffer(b"".join(numbers), np.uint8)


def look_up(code_point, paged: tuple[np.ndarray, np.ndarray], xp):
    """Value of each code point, uint8. paged: result of `pages`; xp: numpy or jax.numpy."""
    page_of, of_pages = paged
    page = xp.asarray(page_of)[code_point >> PAGE_BITS]
    offset = code_point & ((1 << PAGE_BITS) - 1)
    return xp.asarray(of_pages)[(page << PAGE_BITS) | offset]


def completed(window, xp):
    """Code point of the character that ends at the last byte of each window, uint32; 0 if none.

    window: uint32, the last four bytes, the latest in the lowest 8 bits; xp: numpy or jax.numpy.
    """
    # The low 6 bits of the four bytes, concatenated, contain the code point of every form.
    bits = (
        (window & 0x3F)
        | ((window >> 2) & 0xFC0)
        | ((window >> 4) & 0x3F000)
        | ((window >> 6) & 0x1C0000)
    )
    two = ((window & 0xE0C0) == 0xC080) & ((bits & 0x7FF) >= 0x80)  # lower bounds: no overlongs
    three = ((window & 0xF0C0C0) == 0xE08080) & ((bits & 0xFFFF) >= 0x800)
    three = three & ((bits & 0xF800) != 0xD800)  # no surrogates
    mask, form = np.uint32(0xF8C0C0C0), np.uint32(0xF0808080)  # too large for JAX's Python ints
    four = ((window & mask) == form) & (bits >= 0x10000) & (bits < 0x110000)
    return sum(
        value * is_form.astype(np.uint32)  # at most one form matches; faster than nested where
        for value, is_form in (
            (window & 0x7F, (window & 0x80) == 0),
            (bits & 0x7FF, two),
            (bits & 0xFFFF, three),
            (bits, four),
        )
    )
