"""The Unicode script of the text so far, for every byte.

The script id of a byte is the script of the last complete character, up to and including that
byte, whose Script property is neither Common nor Inherited. It depends only on this byte and
earlier bytes. The rules:

* The last byte of a character already has the script of the character; its earlier bytes have the
  script of the text before.
* Until the first such character the id is 0, ``Common``. Each document starts at 0 again.
* Characters without a Unicode script (private use, unassigned) count as ``Unknown``.
* A character is complete at the last byte of a sequence of table 3-7 of the Unicode Standard
  (well-formed UTF-8). All other bytes leave the script unchanged: stray continuation bytes,
  truncated and overlong forms, surrogates, code points above U+10FFFF, and the BOS, EOS and padding
  bytes.

A lead byte is never a continuation byte. So a decoder that restarts after each maximal subpart of
an ill-formed sequence finds exactly the windows of one to four bytes that are well formed, and the
last four bytes determine whether a character ends here and which one. Hence the state of a stream
is one 32-bit number: the script id in the highest byte, then the last three bytes; 0 at a document
start. `script_ids` (whole texts) and `script_step` (one byte, NumPy or JAX) use the same state.
"""

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hnet.code_points import completed, look_up, pages
from hnet.data.script_table import COMMON, TABLE_FILE, read_table
from hnet.errors import ConfigError

if TYPE_CHECKING:
    import jax

START_STATE = 0

_BLOCK_LEN = 1 << 15  # bytes per pass: small enough that temporaries reuse memory


SCRIPTS, _SCRIPT_OF = read_table(TABLE_FILE.read_text(encoding="utf-8"))
"""Names of the scripts by id: ``SCRIPTS[0]`` is ``Common`` (no script so far), ``SCRIPTS[1]`` is
``Unknown``."""
_PAGED = pages(_SCRIPT_OF)
_ASCII = bytes(_SCRIPT_OF[:128]) + bytes(128)  # for bytes.translate: 0 for every other byte


def _completed(window, xp):
    """Script id of the character that ends at the last byte of each window; 0 if none or Common.

    window: uint32, the last four bytes, the latest in the lowest 8 bits; xp: numpy or jax.numpy.
    Returns uint8.
    """
    return look_up(completed(window, xp), _PAGED, xp)


def script_step(
    state: "jax.Array | np.ndarray", byte: "jax.Array | np.ndarray"
) -> "tuple[jax.Array | np.ndarray, jax.Array | np.ndarray]":
    """Advance many streams by one byte each; for generation inside ``jax.jit``.

    state: uint32, any shape, 0 at a document start; byte: integers of the same shape (values
    outside 0..255 count as a byte that completes no character). Both are JAX or NumPy arrays.
    Returns (state uint32, script id uint8), the same values as `script_ids`.
    """
    import jax  # imported here because configurations read the script names without JAX

    xp = jax.numpy if any(isinstance(x, jax.Array) for x in (state, byte)) else np
    byte = xp.where((byte >= 0) & (byte <= 0xFF), byte, 0xFF).astype(np.uint32)
    window = (state << 8) | byte  # the shift drops the script id
    found = _completed(window, xp)
    script_id = xp.where(found != COMMON, found, (state >> 24).astype(np.uint8))
    return (script_id.astype(np.uint32) << 24) | (window & 0xFFFFFF), script_id


def script_ids(data: bytes | np.ndarray, state: int = START_STATE) -> tuple[np.ndarray, int]:
    """Script id of every byte of a text, or of its next part.

    data: bytes-like, or uint8 (n,); state: state returned for the part before, 0 at a document
    start. Returns (ids uint8 (n,), state). The ids do not depend on how a text is split into parts.
    Raises TypeError if data is neither bytes-like nor uint8 (n,).
    """
    if not isinstance(data, np.ndarray):
        data = np.frombuffer(data, np.uint8)
    if data.dtype != np.uint8 or data.ndim != 1:
        raise TypeError(f"data is {data.dtype} of {data.ndim} dimensions: give bytes, uint8 (n,)")
    state = int(state)
    text = np.concatenate([_tails(np.array([state])).ravel(), data])
    ids = _fill(text, np.array([2]), np.array([state >> 24]))
    return ids[3:], int(_states(text[-3:], ids[-1]))


def script_ids_of_rows(
    input_ids_BL: np.ndarray, segment_ids_BL: np.ndarray, state_B: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Script ids of packed rows; the script restarts wherever the segment id changes.

    input_ids_BL: integers, bytes (values outside 0..255 complete no character); segment_ids_BL:
    integers, 0 = padding (script id 0). state_B: uint32, state of the document that continues at
    the first position of each row, 0 if a document starts there (None: 0 for all rows). Returns
    (ids uint8 (B, L), state uint32 (B,) after the last position of each row).

    A row does not contain the text before it. Use this function for rows that hold whole documents
    or whose states are known; otherwise call `script_ids` on each document and split the ids like
    the bytes.
    """
    B, L = input_ids_BL.shape
    state_B = np.zeros(B, np.uint32) if state_B is None else np.asarray(state_B, np.uint32)
    if not B * L:
        return np.zeros((B, L), np.uint8), state_B
    starts_BL = np.ones((B, L), bool)
    starts_BL[:, 1:] = segment_ids_BL[:, 1:] != segment_ids_BL[:, :-1]
    state_BL = np.zeros((B, L), np.uint32)
    state_BL[:, 0] = state_B
    state_D = state_BL[starts_BL]  # state of each document in the batch
    # Put the bytes of the state before each document, so that one pass handles the whole batch.
    position = (np.arange(B * L) + 3 * np.cumsum(starts_BL)).reshape(B, L)
    first_D = position[starts_BL]
    text = np.zeros(B * L + 3 * len(first_D), np.uint8)
    text[position] = np.where((input_ids_BL >= 0) & (input_ids_BL <= 0xFF), input_ids_BL, 0xFF)
    text[first_D[:, None] + np.arange(-3, 0)] = _tails(state_D)
    ids_BL = _fill(text, first_D - 1, state_D >> 24)[position]
    ids_BL[segment_ids_BL == 0] = COMMON
    return ids_BL, _states(text[position[:, -1:] + np.arange(-2, 1)], ids_BL[:, -1])


def _tails(state_D: np.ndarray) -> np.ndarray:
    """The last three bytes in each state, (D,) -> uint8 (D, 3)."""
    return (state_D[:, None] >> np.array([16, 8, 0], state_D.dtype)).astype(np.uint8)


def _states(tails: np.ndarray, script_id: np.ndarray) -> np.ndarray:
    """State from the last three bytes (..., 3) and the script id (...)."""
    oldest, middle, latest = np.moveaxis(tails.astype(np.uint32), -1, 0)
    return (script_id.astype(np.uint32) << 24) | (oldest << 16) | (middle << 8) | latest


def _fill(text: np.ndarray, set_at: np.ndarray, set_to: np.ndarray) -> np.ndarray:
    """Script id of every byte of text, uint8 (n,), with ids overridden at ascending positions.

    set_at: positions, set_to: their ids. set_at[0] must be 2: the first three bytes are context,
    and their ids have no meaning.
    """
    ids = np.empty(len(text), np.uint8)
    ids[2] = set_to[0]
    ramp = np.arange(1, min(_BLOCK_LEN, len(text)) + 1, dtype=np.int32) << 8
    for start in range(3, len(text), _BLOCK_LEN):
        completed = _completed_in(text[start - 3 : start + _BLOCK_LEN])
        stop = start + len(completed)
        first, last = np.searchsorted(set_at, (start, stop))
        only = completed.max()
        if first == last and not np.any((completed != only) & (completed != COMMON)):
            # Text of one script, such as English: fill from its first character on.
            begin = start + int(np.argmax(completed)) if only else stop
            ids[start:begin] = ids[start - 1]
            ids[begin:stop] = only
            continue
        # Position in the high bits, id in the low bits: the running maximum gives the latest id.
        key = (ramp[: len(completed)] | completed) * (completed != COMMON)
        at = set_at[first:last] - start
        key[at] = ramp[at] | set_to[first:last]
        key[0] = max(key[0], ids[start - 1])  # any key with a position is larger than an id
        ids[start:stop] = np.maximum.accumulate(key)
    return ids


def _completed_in(text: np.ndarray) -> np.ndarray:
    """`_completed` for each position of text, uint8 (n,), from the fourth on: uint8 (n - 3,)."""
    completed = np.frombuffer(bytearray(text[3:]).translate(_ASCII), np.uint8)
    leads = np.flatnonzero(text >= 0xC2)
    if len(leads):
        lead_bytes = text[leads]
        ends = leads - 2 + (lead_bytes >= 0xE0) + (lead_bytes >= 0xF0)
        ends = ends[(ends >= 0) & (ends < len(completed))]
        completed[ends] = _completed(_windows(text).take(ends), np)
    return completed


def _windows(text: np.ndarray) -> np.ndarray:
    """The four bytes that end at each position from the fourth on, uint32 (n - 3,)."""
    text = text.astype(np.uint32)
    return (text[:-3] << 24) | (text[1:-2] << 16) | (text[2:-1] << 8) | text[3:]


def of_whole_characters(
    script_ids_N: np.ndarray, input_ids_N: np.ndarray, documents_N: np.ndarray
) -> np.ndarray:
    """Script ids in which each byte of a character has the script of its last byte.

    The last axis is the text, any axes before it are rows; documents_N: documents of the bytes.
    """
    found_N = script_ids_N.copy()
    ids_N, same_N = input_ids_N[..., 1:], documents_N[..., 1:] == documents_N[..., :-1]
    goes_on_N = (ids_N >= 0x80) & (ids_N < 0xC0) & same_N
    for _ in range(3):
        found_N[..., :-1] = np.where(goes_on_N, found_N[..., 1:], found_N[..., :-1])
    return found_N


def route_table(groups: Sequence[Sequence[str]], field: str = "route_groups") -> np.ndarray:
    """Route of every script id, int32 (len(SCRIPTS),).

    groups: groups of names from SCRIPTS. Group i has route i + 1; scripts in no group share route
    0, the default. So there are len(groups) + 1 routes, and a script that is left out is trained
    with the default route. field: name of the setting in the ConfigError for an invalid group.
    """
    route_of = np.zeros(len(SCRIPTS), np.int32)
    for i, group in enumerate(groups):
        if isinstance(group, str) or not group:
            raise ConfigError(f"{field}.{i}={group!r} is no group of scripts: write ('Latin',)")
        for name in group:
            if name not in SCRIPTS:
                raise ConfigError(f"{field}.{i} has {name!r}, {_remedy(name)}")
            script_id = SCRIPTS.index(name)
            if route_of[script_id]:
                raise ConfigError(
                    f"{field}.{i} has {name!r}, which is in group {route_of[script_id] - 1} "
                    "already: name each script once"
                )
            route_of[script_id] = i + 1
    return route_of


def _remedy(name: str) -> str:
    if name == "Inherited":
        return "whose characters take the script of the text before: leave it out"
    near = difflib.get_close_matches(str(name).capitalize(), SCRIPTS, n=1, cutoff=0)
    return f"which is no Unicode script: the nearest is {near[0]!r} (hnet.data.scripts.SCRIPTS)"
