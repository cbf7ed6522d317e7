"""Valid UTF-8 as a byte automaton: a mask of the bytes that may come next, and text for people.

The states say what is still owed to the current character (Unicode 16, table 3-7, "Well-formed
UTF-8 byte sequences"): START, one to three continuation bytes, or one of the four second bytes
whose range is narrower.
"""

import codecs

import jax
import jax.numpy as jnp
import numpy as np

START, ONE, TWO, THREE, AFTER_E0, AFTER_ED, AFTER_F0, AFTER_F4, INVALID = range(9)


def _transitions() -> np.ndarray:
    table = np.full((9, 256), INVALID, np.int32)
    table[START, :0x80] = START
    table[START, 0xC2:0xE0] = ONE
    table[START, 0xE0:0xF0] = TWO
    table[START, 0xF0:0xF5] = THREE
    for lead, state in ((0xE0, AFTER_E0), (0xED, AFTER_ED), (0xF0, AFTER_F0), (0xF4, AFTER_F4)):
        table[START, lead] = state
    continuation = slice(0x80, 0xC0)
    table[ONE, continuation] = START
    table[TWO, continuation] = ONE
    table[THREE, continuation] = TWO
    table[AFTER_E0, 0xA0:0xC0] = ONE  # shorter forms exist below
    table[AFTER_ED, 0x80:0xA0] = ONE  # surrogates lie above
    table[AFTER_F0, 0x90:0xC0] = TWO  # shorter forms exist below
    table[AFTER_F4, 0x80:0x90] = TWO  # U+10FFFF is the end
    return table


NEXT = _transitions()
OWED = np.array([0, 1, 2, 3, 2, 2, 3, 3, 1 << 30], np.int32)  # bytes that complete the character


def advance(state_B: jax.Array, byte_B: jax.Array) -> jax.Array:
    """State after one more byte; one that cannot follow begins a new character, or is skipped."""
    table, byte_B = jnp.asarray(NEXT), jnp.minimum(byte_B, 255)
    follows_B, begins_B = table[state_B, byte_B], table[START, byte_B]
    next_B = jnp.where(follows_B == INVALID, begins_B, follows_B)
    return jnp.where(next_B == INVALID, START, next_B)


def allowed(state_B: jax.Array, remaining_B: jax.Array) -> jax.Array:
    """Bytes (B, 256) that keep the text valid and let it end well within `remaining_B` bytes.

    Where no end is near enough (a prompt that stops within a character), those that keep it valid.
    """
    owed_BV = jnp.asarray(OWED)[jnp.asarray(NEXT)[state_B]]
    in_time_BV = owed_BV < remaining_B[:, None]
    possible_B1 = jnp.any(in_time_BV, axis=1, keepdims=True)
    return jnp.where(possible_B1, in_time_BV, owed_BV < OWED[INVALID])


def state_after(text: bytes) -> int:
    """State of the automaton after a prompt, which may be invalid or end within a character."""
    state = START
    for byte in text[-4:]:  # no character is longer
        state = NEXT[START, byte] if NEXT[state, byte] == INVALID else NEXT[state, byte]
        state = START if state == INVALID else state
    return int(state)


class TextStream:
    """Bytes in, text out: whole characters only, U+FFFD for what can never become one."""

    def __init__(self):
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, data: bytes, *, final: bool = False) -> str:
        """The text that `data` completes; with `final`, what is left over too."""
        return self._decoder.decode(data, final)
