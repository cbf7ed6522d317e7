"""The UTF-8 automaton and the text stream against Python's own decoder."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hnet.decode import utf8

# bytes near every edge of the table, and random ones
EDGES = [0x00, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1, 0xC2, 0xDF, 0xE0, 0xE1, 0xEC,
         0xED, 0xEE, 0xEF, 0xF0, 0xF1, 0xF3, 0xF4, 0xF5, 0xFF]  # fmt: skip
BYTES = st.lists(st.sampled_from(EDGES) | st.integers(0, 255), max_size=12).map(bytes)


advance = jax.jit(utf8.advance)
allowed_after = jax.jit(utf8.allowed)


def is_prefix_of_text(data: bytes) -> bool:
    """Whether some continuation makes the bytes valid UTF-8."""
    tails = [b"", b"\x80", b"\x90", b"\xa0", b"\x80\x80", b"\x90\x80", b"\xa0\x80", b"\x80" * 3,
             b"\x90\x80\x80"]  # fmt: skip
    return any(_decodes(data + tail) for tail in tails)


def _decodes(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


@given(BYTES)
def test_accepts_exactly_the_prefixes_of_valid_text(data):
    state, valid = utf8.START, True
    for i, byte in enumerate(data):
        state = utf8.NEXT[state, byte]
        valid = valid and state != utf8.INVALID
        assert valid == is_prefix_of_text(data[: i + 1])
        if not valid:
            return
        assert (state == utf8.START) == _decodes(data[: i + 1])


@given(st.text(max_size=4), st.integers(1, 6))
def test_allowed_bytes_end_the_text_in_time(text, remaining):
    """In any state, exactly the allowed bytes leave a way to a valid end."""
    data = text.encode()[: -remaining or None]
    state = utf8.state_after(data)
    allowed = allowed_after(np.array([state], np.int32), np.array([remaining]))[0]
    owed = {byte: utf8.OWED[utf8.NEXT[state, byte]] for byte in range(256)}
    in_time = [byte for byte in range(256) if owed[byte] <= remaining - 1]
    expected = in_time or [byte for byte in range(256) if owed[byte] <= 3]
    assert sorted(np.flatnonzero(allowed)) == expected


@given(BYTES)
def test_the_state_after_bytes_is_that_of_the_stream(data):
    """Also for invalid text: on the device byte by byte, on the host from the last bytes."""
    state = np.zeros(1, np.int32)
    for byte in data:
        state = advance(state, np.array([byte], np.int32))
    assert int(state[0]) == utf8.state_after(data)


@given(BYTES, st.lists(st.integers(0, 12), max_size=5))
def test_streamed_text_is_the_whole_text_in_whole_characters(data, cuts):
    stream, edges = utf8.TextStream(), sorted({0, *(min(c, len(data)) for c in cuts), len(data)})
    pieces = [stream.feed(data[a:b]) for a, b in zip(edges, edges[1:])]
    shown = "".join(pieces)
    pieces.append(stream.feed(b"", final=True))
    assert "".join(pieces) == data.decode("utf-8", "replace")
    # text that was already shown is not changed by later bytes
    assert data.decode("utf-8", "replace").startswith(shown)


@pytest.mark.parametrize("text", ["aé€😀", "नमस्ते", "\U0010ffff", "\ud7ff\ue000"])
def test_every_valid_text_stays_possible(text):
    state = np.zeros(1, np.int32)
    data = text.encode()
    for i, byte in enumerate(data):
        assert allowed_after(state, np.array([len(data) - i]))[0, byte]
        state = advance(state, np.array([byte], np.int32))
    assert int(state[0]) == utf8.START
