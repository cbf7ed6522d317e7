"""Text from data, made safe to print or draw."""

import unicodedata

JOINERS = "\u200c\u200d"
"""Zero-width characters that change adjacent letters, in Persian, Hindi and emoji."""
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
_SHORT = {"\t": "\\t", "\n": "\\n", "\r": "\\r"}


def printable(text: object, *, keep: str = "") -> str:
    r"""`text` with characters escaped that control a terminal, change text direction or end a line.

    These are control and format characters (escape sequences, U+202E), line separators and
    surrogates. They become ``\u{202e}``, ``\n``, or ``\xff`` for a byte of a file name that is not
    valid UTF-8. Characters in `keep` are unchanged.
    """
    text = str(text)
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in keep else shown(c) for c in text)


def shown(char: str) -> str:
    """One character, escaped as in `printable`."""
    if unicodedata.category(char) not in _HIDDEN:
        return char
    if "\udc80" <= char <= "\udcff":  # a byte that os.fsdecode could not decode
        return f"\\x{ord(char) - 0xDC00:02x}"
    return _SHORT.get(char, f"\\u{{{ord(char):04x}}}")
