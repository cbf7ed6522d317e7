"""Routes of packed rows, exact also for rows that start in the middle of a document.

The route of a byte is the route of the script of its document so far (`hnet.data.scripts`), so it
is a function of this byte and earlier bytes. BOS comes before any script, EOS has the script of the
text before it, padding has none. For a row that starts in the middle of a document, the text before
the row is read backwards until a character with a script is found.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from hnet.data.documents import Documents
from hnet.data.packing import Row, Stream
from hnet.data.scripts import route_table, script_ids, script_ids_of_rows

_WINDOW = 32  # number of bytes before each row that are examined for all rows at once
_STRIDE = 1024  # number of bytes read backwards at a time if _WINDOW is not enough
_UNKNOWN = 0x5C121  # separates the random numbers of unknown scripts from others of the same seed


class ScriptStates:
    """Script state of documents before a given byte."""

    def __init__(self, documents: Documents):
        self._documents = documents
        self._known: dict[tuple[int, int], int] = {}

    def before(self, d: int, stop: int) -> int:
        """State that `script_ids` returns for the first `stop` bytes of document d."""
        tail = script_ids(self._documents.read(d, max(0, stop - 3), stop))[1] & 0xFFFFFF
        return self._script(d, stop) << 24 | tail

    def _script(self, d: int, stop: int) -> int:
        """Script id at the last of the first `stop` bytes.

        Text without a script, such as numbers, is read only once: results are cached.
        """
        script, passed = 0, []
        while stop and not script:
            if (d, stop) in self._known:
                script = self._known[d, stop]
                break
            start = (stop - 1) // _STRIDE * _STRIDE
            text = self._documents.read(d, max(0, start - 3), stop)  # 3: rest of a character
            script = int(script_ids(text)[0][-1])
            if not script and stop % _STRIDE == 0:
                passed.append((d, stop))
            stop = start
        self._known |= dict.fromkeys(passed, script)
        return script


class RowRoutes:
    """Route ids for the rows of some streams."""

    def __init__(self, streams: Sequence[Stream], route_groups: Sequence[Sequence[str]] = ()):
        """Raises ConfigError for a group that names no script."""
        self._streams = streams
        self._states = [ScriptStates(stream.documents) for stream in streams]
        self._route_of = route_table(route_groups, "model.route_groups")

    def __call__(self, places: Sequence[tuple[int, int]], rows: Sequence[Row]) -> np.ndarray:
        """Route ids, int32 (rows, L). places: (stream, row number) of each row."""
        return self._route_of[self.scripts(places, rows)]

    def scripts(self, places: Sequence[tuple[int, int]], rows: Sequence[Row]) -> np.ndarray:
        """Script ids, uint8 (rows, L)."""
        ids_BL, _ = script_ids_of_rows(
            np.stack([row.input_ids for row in rows]),
            np.stack([row.segment_ids for row in rows]),
            self._states_before(places),
        )
        return ids_BL

    def _states_before(self, places: Sequence[tuple[int, int]]) -> np.ndarray:
        """uint32 (rows,): script state of the document before the first token of each row."""
        before = [self._streams[stream].text_before(r) for stream, r in places]
        window_BW = np.zeros((len(places), _WINDOW), np.uint8)  # zeros complete no script
        for window_W, (stream, _), (d, stop) in zip(window_BW, places, before):
            text = self._streams[stream].documents.read(d, max(0, stop - _WINDOW), stop)
            window_W[_WINDOW - len(text) :] = text
        _, state_B = script_ids_of_rows(window_BW, np.ones_like(window_BW))
        for b in np.flatnonzero(state_B >> 24 == 0):
            if before[b][1] > _WINDOW:
                state_B[b] = self._states[places[b][0]].before(*before[b])
        return state_B


def unknown_script(seed: int, slot: int, frac: float) -> np.ndarray | None:
    """Byte permutation, int32 (256,), that rewrites a row in a synthetic, unknown script.

    Returns None except for a share `frac` of the slots of a run. The choice and the table are
    functions of (seed, slot). Continuation bytes, lead bytes of two-byte characters and lead bytes
    of three-byte characters are each permuted among themselves. So words, character lengths and
    repetitions are preserved; ASCII, BOS and EOS are unchanged. The result may be invalid UTF-8.
    """
    rng = np.random.default_rng((_UNKNOWN, seed, slot))
    if rng.random() >= frac:
        return None
    table = np.arange(256, dtype=np.int32)
    for first, stop in ((0x80, 0xC0), (0xC2, 0xE0), (0xE0, 0xF0)):
        rng.shuffle(table[first:stop])
    return table


def in_unknown_scripts(
    batches: Iterable[dict[str, np.ndarray]], seed: int, frac: float = 1.0
) -> Iterator[dict[str, np.ndarray]]:
    """Yield the batches with a share `frac` of the rows rewritten, each in its own unknown script.

    All positions of the rewritten rows have the default route. Takes whole batches, in order.
    """
    for k, batch in enumerate(batches):
        ids_BL, routes_BL = batch["input_ids"].copy(), batch["route_ids"].copy()
        for row in range(len(ids_BL)):
            table = unknown_script(seed, k * len(ids_BL) + row, frac)
            if table is not None:
                ids_BL[row], routes_BL[row] = table[ids_BL[row]], 0
        yield batch | {"input_ids": ids_BL, "route_ids": routes_BL}
