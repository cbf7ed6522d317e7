"""Rules of characters as finite automata over the bytes of UTF-8 text.

A rule is a function ``step(state, symbol) -> (state, output)`` in plain Python, where a symbol says
of a character what the rule needs to know. `Automaton` calls it for every reachable state and keeps
its results as tables. A stream looks its next state up; whole rows compose the tables of their
positions by an associative scan, which needs log L steps instead of L.

A character is complete at its last byte. Earlier bytes, and bytes that no character contains,
leave the state unchanged and have the output 0. Bytes from 0xF8 on occur in no text (BOS, EOS):
after one, the rule starts again.
"""

from collections.abc import Callable, Hashable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hnet.code_points import completed, look_up, pages, read_table
from hnet.nn.cache import last_positions
from hnet.nn.layers import segment_positions, segment_starts

_TABLE_FILE = Path(__file__).with_name("characters.txt")
FIRST_SPECIAL = 0xF8
_NONE, _RESTART = 0, 1  # symbols: no character ends here; the rule starts again

Step = Callable[[Any, Any], tuple[Any, int]]


class AutomatonState(NamedTuple):
    """State of a stream."""

    window_R: jax.Array
    """last bytes, uint32, the latest in the lowest 8 bits"""
    state_R: jax.Array
    """state of the automaton, int32"""


@cache
def _characters() -> tuple[tuple[str, ...], tuple[np.ndarray, np.ndarray]]:
    """Names of the classes of characters, and the class of each code point for `look_up`."""
    names, class_of = read_table(_TABLE_FILE.read_text(encoding="utf-8"), other=0)
    return names, pages(class_of)


class Automaton:
    """Tables of a rule. S states, 0 = start; C symbols."""

    def __init__(self, start: Hashable, step: Step, symbol: Callable[[str], Hashable]):
        """start: state before the first character. symbol: class of a character -> symbol.

        The outputs of `step` are integers from 0 to 127. The rule must have at most 256 states.
        """
        names, self._class_of = _characters()
        symbols = sorted({symbol(name) for name in names})
        of_class = [2 + symbols.index(symbol(name)) for name in names]
        self._symbol_of = np.array(of_class, np.int32)
        numbers, rows, outputs = {start: 0}, [], []
        for state in (waiting := [start]):  # grows while it is read
            found = [step(state, of) for of in symbols]
            for new, _ in found:
                if new not in numbers:
                    numbers[new] = len(numbers)
                    waiting.append(new)
            rows.append([numbers[state], 0, *(numbers[new] for new, _ in found)])
            outputs.append([0, 0, *(output for _, output in found)])
        if len(numbers) > 256:
            raise ValueError(f"a rule with {len(numbers)} states: use at most 256")
        self.next_SC, self.output_SC = np.array(rows, np.uint8), np.array(outputs, np.int8)

    def symbols(self, window: jax.Array) -> jax.Array:
        """Symbol of the character that ends at each byte, int32. window: the last four bytes."""
        byte, code_point = window & 0xFF, completed(window, jnp)
        found = jnp.asarray(self._symbol_of)[look_up(code_point, self._class_of, jnp)]
        found = jnp.where((code_point == 0) & (byte != 0), _NONE, found)
        return jnp.where(byte >= FIRST_SPECIAL, _RESTART, found)

    def init(self, rows: int) -> AutomatonState:
        return AutomatonState(jnp.zeros((rows,), jnp.uint32), jnp.zeros((rows,), jnp.int32))

    def step(self, state: AutomatonState, byte_R: jax.Array) -> tuple[AutomatonState, jax.Array]:
        """(state, output at this byte, int32)."""
        window_R = (state.window_R << 8) | byte_R.astype(jnp.uint32)
        at = (state.state_R, self.symbols(window_R))
        new = AutomatonState(window_R, jnp.asarray(self.next_SC)[at].astype(jnp.int32))
        return new, jnp.asarray(self.output_SC)[at].astype(jnp.int32)

    def __call__(self, bytes_BL: jax.Array, segment_ids_BL: jax.Array) -> jax.Array:
        """Outputs at the bytes of whole rows, int32 (B, L); each segment is a text of its own."""
        return self.run(bytes_BL, segment_ids_BL)[0]

    def run(
        self, bytes_BL: jax.Array, segment_ids_BL: jax.Array
    ) -> tuple[jax.Array, AutomatonState]:
        """(outputs, states after each byte (B, L))."""
        window_BL = _windows(bytes_BL, segment_ids_BL)
        symbol_BL = self.symbols(window_BL)
        starts_BL = segment_starts(segment_ids_BL)
        next_CS = jnp.asarray(self.next_SC.T)
        # map of a position: state before it -> state after it; constant at the start of a text
        map_BLS = next_CS[symbol_BL]
        map_BLS = jnp.where(starts_BL[..., None], map_BLS[..., :1], map_BLS)
        compose = lambda first, then: jnp.take_along_axis(
            then, first.astype(jnp.int32), axis=-1, mode="promise_in_bounds"
        )
        state_BL = jax.lax.associative_scan(compose, map_BLS, axis=1)[..., 0].astype(jnp.int32)
        before_BL = jnp.where(starts_BL, 0, jnp.pad(state_BL[:, :-1], ((0, 0), (1, 0))))
        output_BL = jnp.asarray(self.output_SC)[before_BL, symbol_BL].astype(jnp.int32)
        return output_BL, AutomatonState(window_BL, state_BL)

    def after(self, bytes_BL: jax.Array, segment_ids_BL: jax.Array) -> AutomatonState:
        """State of a stream after rows of one text each, padded on the right."""
        _, states = self.run(bytes_BL, segment_ids_BL)
        lengths_B = jnp.sum(segment_ids_BL != 0, axis=1, dtype=jnp.int32)
        return AutomatonState(*(last_positions(a_BL, lengths_B, 1)[:, 0] for a_BL in states))


def _windows(bytes_BL: jax.Array, segment_ids_BL: jax.Array) -> jax.Array:
    """The last four bytes of each position's segment, uint32; 0 before its start."""
    byte_BL, index_BL = bytes_BL.astype(jnp.uint32), segment_positions(segment_ids_BL)
    window_BL = byte_BL
    for back in (1, 2, 3):
        earlier_BL = jnp.pad(byte_BL, ((0, 0), (back, 0)))[:, : byte_BL.shape[1]]
        window_BL = window_BL | jnp.where(index_BL >= back, earlier_BL << (8 * back), 0)
    return window_BL
