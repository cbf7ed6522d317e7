"""One text with the boundaries of each stage of a model; the data structure of this package.

All offsets are byte offsets into the text. A chunk *starts at* an offset, for both alignments: a
START boundary at byte t starts a chunk at t; an END boundary at byte t ends a chunk after byte t,
so the next chunk starts at t + 1 and p_t belongs to offset t + 1. The first chunk always starts at
0.

JSON form (`Segmentation.to_json`), the same in files, in pages and over HTTP::

    {"version": 1, "name": "probe 3",
     "text": "valid UTF-8"   or   "base64": "any other bytes",
     "routes": [[0, "Latin"], [12, "Han"]],        # runs: this route from that offset on
     "gold": {"words": [4, 9]},                    # offsets inside the text at which units start
     "stages": [{"starts": [0, 4, 9], "probs": [1.0, 0.03, ...]}, ...],  # outermost first
     "bits": [6.25, 0.031, ...]}                   # surprisal of each byte, if it is known

`probs` of a stage has one entry per position of that stage. The positions of stage 0 are the bytes;
the positions of stage s are the chunks of stage s - 1, so there is one entry per offset in `starts`
of stage s - 1.
"""

import base64
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from hnet.data.forms import lines_of
from hnet.errors import ConfigError
from hnet.files import parse_json, read_bytes

VERSION = 1
BITS_DIGITS = 3
"""Number of decimals of a stored surprisal."""
Alignment = Literal["start", "end"]


@dataclass(frozen=True)
class StageBoundaries:
    """Boundaries of one stage on one text."""

    starts: tuple[int, ...]
    """byte offsets at which the chunks start, increasing from 0"""
    probs: tuple[float, ...]
    """probability that a chunk starts, for each position of this stage; float32 values"""


@dataclass(frozen=True)
class Segmentation:
    """One text, its gold boundaries and the chunks of every stage, outermost first.

    Without stages it is a text with only gold boundaries. Raises ConfigError if the parts
    contradict each other.
    """

    data: bytes
    name: str = ""
    stages: tuple[StageBoundaries, ...] = ()
    routes: tuple[tuple[int, str], ...] = ()
    """runs of (first byte, name of the route or script); empty = unknown"""
    gold: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """kind -> offsets, strictly inside the text, at which units of that kind start"""
    bits: tuple[float, ...] = ()
    """surprisal -log2 p(byte | bytes before it) of each byte; empty = unknown"""

    def __post_init__(self):
        _check(self)

    def positions(self, stage: int) -> tuple[int, ...]:
        """Byte offset of every position of `stage`, parallel to `stages[stage].probs`."""
        return tuple(range(len(self.data))) if stage == 0 else self.stages[stage - 1].starts

    def boundaries(self, stage: int) -> np.ndarray:
        """Offsets strictly inside the text at which chunks of `stage` start, int64."""
        return np.asarray(self.stages[stage].starts[1:], np.int64)

    def chunk_lengths(self, stage: int) -> np.ndarray:
        """Number of bytes per chunk of `stage`, int64; the sum is the length of the text."""
        return np.diff(np.asarray([*self.stages[stage].starts, len(self.data)], np.int64))

    def chunks(self, stage: int) -> list[bytes]:
        """The chunks of `stage`; their concatenation is the text."""
        starts = self.stages[stage].starts
        return [self.data[a:b] for a, b in zip(starts, [*starts[1:], len(self.data)])]

    def route_names(self) -> tuple[str, ...]:
        """Names of the routes that occur, sorted."""
        return tuple(sorted({name for _, name in self.routes}))

    def to_json(self) -> dict[str, Any]:
        """The JSON form described above; `from_json` returns an equal object."""
        return {**text_json(self), **step_json(self)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Segmentation":
        """Read the JSON form. Raises ConfigError for anything else."""
        try:
            if content["version"] != VERSION:
                raise ConfigError(
                    f"segmentation version {content['version']!r}: this program reads {VERSION}"
                )
            text = content.get("text")
            return cls(
                data=base64.b64decode(content["base64"], validate=True)
                if text is None
                else text.encode(),
                name=str(content["name"]),
                stages=tuple(
                    StageBoundaries(tuple(map(int, s["starts"])), tuple(map(float, s["probs"])))
                    for s in content["stages"]
                ),
                routes=tuple((int(start), str(name)) for start, name in content["routes"]),
                gold={str(k): tuple(map(int, v)) for k, v in content["gold"].items()},
                bits=tuple(map(float, content.get("bits", ()))),
            )
        except ConfigError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as e:
            raise ConfigError(
                f"segmentation JSON is incomplete or malformed ({type(e).__name__}: {e}): "
                "write it with Segmentation.to_json"
            ) from None

    @classmethod
    def from_router(
        cls,
        data: bytes,
        outputs: Iterable[tuple[np.ndarray, np.ndarray]],
        *,
        name: str = "",
        alignment: Alignment = "start",
        prefix: int = 0,
        routes: Sequence[str] = (),
        gold: Mapping[str, Sequence[int]] | None = None,
        nats: np.ndarray | None = None,
    ) -> "Segmentation":
        """Build the segmentation of one row from the outputs of the boundary predictors.

        outputs: (boundary mask, boundary probability) of each stage, outermost first, each 1-D
        over the positions of that stage; padding at the end is ignored. prefix: number of positions
        before the first byte (1 for a BOS). routes: one name per byte. nats: -ln p of each byte;
        ignored unless all are finite. END arrays of an inner stage may lack the last, incomplete
        chunk. Raises ConfigError for arrays that do not fit the text.
        """
        if alignment not in ("start", "end"):
            raise ConfigError(f"alignment={alignment!r}: use 'start' or 'end'")
        offsets = np.maximum(np.arange(-prefix, len(data)), 0)  # offset of each position
        stages = []
        for i, (mask, prob) in enumerate(outputs):
            starts, probs = _starts_and_probs(i, mask, prob, len(offsets), alignment)
            stages.append((offsets, offsets[starts], probs))
            offsets = offsets[starts]
        return cls(
            data,
            name,
            tuple(_merge_equal(*stage) for stage in stages) if data else _empty(len(stages)),
            runs(routes),
            {kind: inside(offsets, len(data)) for kind, offsets in (gold or {}).items()},
            _bits(nats),
        )


def text_json(segmentation: Segmentation) -> dict[str, Any]:
    """The part of the JSON form that does not change while a model trains."""
    content: dict[str, Any] = {"version": VERSION, "name": segmentation.name}
    try:
        content["text"] = segmentation.data.decode()
    except UnicodeDecodeError:
        content["base64"] = base64.b64encode(segmentation.data).decode("ascii")
    content["routes"] = [list(run) for run in segmentation.routes]
    content["gold"] = {kind: list(offsets) for kind, offsets in segmentation.gold.items()}
    return content


def step_json(segmentation: Segmentation) -> dict[str, Any]:
    """The part of the JSON form that changes while a model trains."""
    content: dict[str, Any] = {
        "stages": [{"starts": list(s.starts), "probs": list(s.probs)} for s in segmentation.stages]
    }
    if segmentation.bits:
        content["bits"] = list(segmentation.bits)
    return content


def read_segmentations(path: str | os.PathLike) -> list[Segmentation]:
    """Read JSON lines of segmentations, as `experiments.segment --json` prints them."""
    try:
        lines = lines_of(read_bytes(path))
        content = [parse_json(line.decode()) for line in lines if line.strip()]
    except OSError as e:
        raise ConfigError(f"segmentation file {os.fspath(path)!r}: {e.strerror}") from None
    except ValueError as e:
        raise ConfigError(f"segmentation file {os.fspath(path)!r} is not JSON: {e}") from None
    return [Segmentation.from_json(item) for item in content]


def runs(names: Sequence[str]) -> tuple[tuple[int, str], ...]:
    """Convert one name per byte to runs of (first byte, name)."""
    return tuple((i, str(n)) for i, n in enumerate(names) if i == 0 or names[i - 1] != n)


def inside(offsets: Iterable[int], length: int) -> tuple[int, ...]:
    """The distinct offsets strictly between 0 and `length`, sorted."""
    return tuple(sorted({int(o) for o in offsets if 0 < o < length}))


def characters(data: bytes) -> list[tuple[int, int, str]]:
    """(start, end, character) of every character; an invalid byte is a lone surrogate U+DC80+."""
    out, start = [], 0
    for char in data.decode("utf-8", "surrogateescape"):
        end = start + (1 if is_invalid(char) else len(char.encode()))
        out.append((start, end, char))
        start = end
    return out


def is_invalid(char: str) -> bool:
    """Whether `characters` returned this for an invalid byte."""
    return "\udc80" <= char <= "\udcff"


def _starts_and_probs(
    stage: int, mask: np.ndarray, prob: np.ndarray, count: int, alignment: Alignment
) -> tuple[np.ndarray, np.ndarray]:
    """(positions at which chunks start, p of a start at each of `count` positions)."""
    mask = np.asarray(mask, bool).reshape(-1)
    prob = np.asarray(prob, np.float32).reshape(-1)
    if alignment == "end":  # an end at t is a start at t + 1
        mask, prob = (np.concatenate([np.ones(1, x.dtype), x]) for x in (mask, prob))
    if min(len(mask), len(prob)) < count:
        raise ConfigError(
            f"stage {stage} has {min(len(mask), len(prob))} values for {count} positions: "
            "pass the whole row, outermost stage first"
        )
    mask, prob = mask[:count], prob[:count]
    if count and not mask[0]:
        raise ConfigError(
            f"stage {stage} starts no chunk at its first position: a START router always does; "
            "pass alignment='end' for END routers"
        )
    return np.flatnonzero(mask), prob


def _merge_equal(offsets: np.ndarray, starts: np.ndarray, probs: np.ndarray) -> StageBoundaries:
    """Merge positions with equal offsets; the positions of the prefix also have offset 0.

    The probability is that of the last of them, which belongs to the text.
    """
    last = np.append(offsets[1:] != offsets[:-1], True)
    return StageBoundaries(tuple(np.unique(starts).tolist()), _short(probs[last]))


def _empty(count: int) -> tuple[StageBoundaries, ...]:
    return (StageBoundaries((), ()),) * count


def _short(probs: np.ndarray) -> tuple[float, ...]:
    """Float of the shortest decimal form of each float32: short in JSON and lossless."""
    return tuple(np.asarray(probs, np.float32).astype("U").astype(float).tolist())


def _bits(nats: np.ndarray | None) -> tuple[float, ...]:
    if nats is None or not np.isfinite(nats).all():
        return ()
    bits = np.maximum(np.asarray(nats, np.float64).reshape(-1) / np.log(2), 0)  # not -0.0
    return tuple(bits.round(BITS_DIGITS).tolist())


def _check(seg: Segmentation) -> None:
    length = len(seg.data)
    if seg.bits and not (len(seg.bits) == length and all(0 <= b < np.inf for b in seg.bits)):
        raise ConfigError(f"bits of {seg.name!r} must be {length} numbers from 0 on, or none")
    for i, stage in enumerate(seg.stages):
        starts, positions = stage.starts, seg.positions(i)
        if list(starts) != sorted(set(starts)) or starts[:1] != ((0,) if length else ()):
            raise ConfigError(f"stages.{i}.starts of {seg.name!r} must increase from 0")
        if not set(starts) <= set(positions):
            raise ConfigError(
                f"stages.{i}.starts of {seg.name!r} are not all at positions of that stage: "
                f"a text of {length} bytes, outermost stage first"
            )
        if len(stage.probs) != len(positions):
            raise ConfigError(
                f"stages.{i}.probs of {seg.name!r} has {len(stage.probs)} values "
                f"for {len(positions)} positions"
            )
        if not all(0 <= p <= 1 for p in stage.probs):
            raise ConfigError(f"stages.{i}.probs of {seg.name!r} must lie between 0 and 1")
    for kind, offsets in seg.gold.items():
        if offsets != inside(offsets, length):
            raise ConfigError(f"gold {kind!r} of {seg.name!r} must increase inside the text")
    run_starts = [start for start, _ in seg.routes]
    if run_starts and (
        run_starts != sorted(set(run_starts)) or run_starts[0] != 0 or run_starts[-1] >= length
    ):
        raise ConfigError(f"routes of {seg.name!r} must increase from 0 inside the text")
