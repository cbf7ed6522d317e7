"""Text that comes from data, made safe to print or draw: one function for all of it."""

import unicodedata

JOINERS = "\u200c\u200d"
"""Characters without width that shape the letters beside them, in Persian, Hindi and emoji."""
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
_SHORT = {"\t": "\\t", "\n": "\\n", "\r": "\\r"}


def printable(text: object, *, keep: str = "") -> str:
    r"""`text` without characters that steer a terminal, turn the text around them or end the line.

    These are control and format characters (escape sequences, U+202E), line separators and
    surrogates. Each is written as its number: ``\u{202e}``, ``\n``, and ``\xff`` for a byte that
    was no UTF-8 in a file name. Characters in `keep` stay as they are.
    """
    text = str(text)
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in keep else shown(c) for c in text)


def shown(char: str) -> str:
    """One character as `printable` writes it."""
    if unicodedata.category(char) not in _HIDDEN:
        return char
    if "\udc80" <= char <= "\udcff":  # a byte that os.fsdecode could not read
        return f"\\x{ord(char) - 0xDC00:02x}"
    return _SHORT.get(char, f"\\u{{{ord(char):04x}}}")
