"""Valid UTF-8 as a byte automaton: a mask of the allowed next bytes, and decoding to text.

A state says which bytes the current character still needs (Unicode 16, table 3-7, "Well-formed
UTF-8 byte sequences"): none (START), one to three continuation bytes, or one of the four second
bytes with a narrower range.
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
    table[AFTER_E0, 0xA0:0xC0] = ONE  # lower bytes: overlong forms
    table[AFTER_ED, 0x80:0xA0] = ONE  # higher bytes: surrogates
    table[AFTER_F0, 0x90:0xC0] = TWO  # lower bytes: overlong forms
    table[AFTER_F4, 0x80:0x90] = TWO  # higher bytes: above U+10FFFF
    return table


NEXT = _transitions()
# Number of bytes that complete the character, for each state.
OWED = np.array([0, 1, 2, 3, 2, 2, 3, 3, 1 << 30], np.int32)


def advance(state_B: jax.Array, byte_B: jax.Array) -> jax.Array:
    """State after one more byte; an invalid byte starts a new character if it can, else START."""
    table, byte_B = jnp.asarray(NEXT), jnp.minimum(byte_B, 255)
    follows_B, begins_B = table[state_B, byte_B], table[START, byte_B]
    next_B = jnp.where(follows_B == INVALID, begins_B, follows_B)
    return jnp.where(next_B == INVALID, START, next_B)


def allowed(state_B: jax.Array, remaining_B: jax.Array) -> jax.Array:
    """Mask (B, 256) of the bytes that keep the text valid and end in time.

    In time: the character can be completed within `remaining_B` bytes. If that is impossible (a
    prompt that ends within a character), all bytes that keep the text valid.
    """
    owed_BV = jnp.asarray(OWED)[jnp.asarray(NEXT)[state_B]]
    in_time_BV = owed_BV < remaining_B[:, None]
    possible_B1 = jnp.any(in_time_BV, axis=1, keepdims=True)
    return jnp.where(possible_B1, in_time_BV, owed_BV < OWED[INVALID])


def state_after(text: bytes) -> int:
    """State of the automaton after a prompt, which may be invalid or end within a character."""
    state = START
    for byte in text[-4:]:  # the longest character has 4 bytes
        state = NEXT[START, byte] if NEXT[state, byte] == INVALID else NEXT[state, byte]
        state = START if state == INVALID else state
    return int(state)


class TextStream:
    """Incremental decoder: returns whole characters, and U+FFFD for invalid bytes."""

    def __init__(self):
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, data: bytes, *, final: bool = False) -> str:
        """The characters that `data` completes; with `final`, also an incomplete rest."""
        return self._decoder.decode(data, final)
