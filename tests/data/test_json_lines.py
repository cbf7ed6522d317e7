"""The text of a JSON line is the same bytes whether the line is read at once or in pieces."""

import json

import hypothesis.strategies as st
import pytest
from hypothesis import given

from hnet.data import json_lines
from hnet.data.json_lines import NoText, text_of_line, text_of_long_line

# Parts of a string as JSON -> its bytes. A high surrogate is only lone where no low one follows.
PARTS = {
    b"a": b"a",
    b"\xff": b"\xff",  # not UTF-8
    "ü".encode(): "ü".encode(),
    b"\xe2\x80\xa8": "\u2028".encode(),
    b"\\n": b"\n",
    b'\\"': b'"',
    b"\\\\": b"\\",
    b"\\/": b"/",
    b"\\u00e9": "é".encode(),
    b"\\\\ud800": b"\\ud800",  # an escaped backslash
    b"\\ud83d\\ude00": "😀".encode(),
    b"\\ud800;": b"\xed\xa0\x80;",
    b"\\udcff": b"\xed\xb3\xbf",
    b"\\uD800.\\uDC00": b"\xed\xa0\x80.\xed\xb0\x80",
}
STRINGS = st.lists(st.sampled_from(sorted(PARTS)), max_size=12)
OTHERS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["text", "a", "b" * 9]), inner, max_size=3)
    ),
    max_leaves=8,
)


def in_pieces(line, size):
    chunks = (line[i : i + size] for i in range(0, len(line), size))
    return b"".join(text_of_long_line(chunks))


@given(STRINGS, OTHERS, OTHERS, st.integers(1, 40), st.integers(5, 30))
def test_text_of_a_line(parts, before, after, size, long):
    text = b"".join(parts)
    line = b'{"a": %b, "text" : "%b", "c": %b}\n' % (
        json.dumps(before).encode(), text, json.dumps(after).encode(),
    )  # fmt: skip
    expected = b"".join(PARTS[p] for p in parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_lines, "LONG", long)
        assert text_of_line(line) == expected
        assert in_pieces(line, size) == expected


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        (b'{"text": "' + b"x" * 50, ValueError, "no end"),
        (b'{"text": "' + b"x" * 50 + b"\x01" + b"y" * 50 + b'"}', ValueError, "no end"),
        (b'{"text": "' + b"x" * 50 + b'\\q"}' + b" " * 50, ValueError, "no end"),
        (b'{"text": "' + b"x" * 50 + b'"', ValueError, "delimiter"),
        (b'{"text": {"text": "' + b"x" * 50 + b'"}}', NoText, 'no string "text"'),
        (b'{"text": ["' + b"x" * 50 + b'"]}', NoText, 'no string "text"'),
        (b'["text", "' + b"x" * 50 + b'"]', NoText, 'no string "text"'),
        (b'{"body": "' + b"x" * 50 + b'"}', NoText, 'no string "text"'),
        (b'"' + b"x" * 50 + b'"', NoText, 'no string "text"'),
        (b'{"text": "' + b"x" * 50 + b'", "text": "y"}', ValueError, 'several "text"'),
        (b"[" * 100_000, ValueError, "nested too deeply"),
    ],
)
def test_what_is_no_such_line(monkeypatch, line, error, message):
    monkeypatch.setattr(json_lines, "LONG", 20)
    with pytest.raises(error, match=message):
        in_pieces(line, 16)


def test_what_is_beside_the_text_is_bounded(monkeypatch):
    monkeypatch.setattr(json_lines, "_MOST", 100)
    with pytest.raises(ValueError, match="more than 100 bytes besides"):
        in_pieces(b'{"ids": [' + b"1, " * 99 + b'1], "text": "x"}', 16)
