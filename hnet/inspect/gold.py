"""Gold boundaries of texts: rules, and readers of annotated files.

All gold boundaries are byte offsets strictly inside the text. Kinds:

* ``characters``: first bytes of UTF-8 characters.
* ``words``: first bytes of words; ``word_ends``: the byte after the last byte of a word. Boundaries
  after a space agree with ``words``, boundaries before it with ``word_ends``.
* ``whitespace``: first bytes of whitespace runs, the rule of most pre-tokenisers.
* ``morphemes``: first bytes of words and of the morphemes inside them.
* ``code_tokens``: first bytes of Python tokens.
"""

import bisect
import io
import itertools
import os
import tokenize
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hnet.data.forms import BOM, lines_of
from hnet.data.json_lines import encode, parse
from hnet.errors import ConfigError, shown
from hnet.files import read_bytes
from hnet.inspect.segmentation import Segmentation, characters, inside, read_segmentations

_LAYOUT_TOKENS = {
    tokenize.ENCODING, tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT,
    tokenize.ENDMARKER,
}  # fmt: skip


def character_starts(data: bytes) -> tuple[int, ...]:
    """First byte of every character except the first; an invalid byte counts as a character."""
    return inside((start for start, _, _ in characters(data)), len(data))


def word_starts(data: bytes) -> tuple[int, ...]:
    """First byte of every run of characters that are not whitespace."""
    return inside((start for start, space in _space_runs(data) if not space), len(data))


def whitespace_starts(data: bytes) -> tuple[int, ...]:
    """First byte of every run of whitespace."""
    return inside((start for start, space in _space_runs(data) if space), len(data))


def _space_runs(data: bytes) -> Iterator[tuple[int, bool]]:
    for space, group in itertools.groupby(characters(data), lambda c: c[2].isspace()):
        yield next(group)[0], space


def code_tokens(data: bytes) -> tuple[int, ...]:
    """First byte of every Python token, without line ends and indentation.

    Tokens are those of the running interpreter (3.12 tokenizes the inside of f-strings). Raises
    ConfigError for text that is not UTF-8 or that the tokenizer refuses.
    """
    offset = len(BOM) if data.startswith(BOM) else 0
    line_starts = []
    try:
        lines = io.StringIO(data[offset:].decode(), newline="").readlines()
        tokens = list(tokenize.generate_tokens(iter([*lines, ""]).__next__))
        if bad := [t.string for t in tokens if t.type == tokenize.ERRORTOKEN]:
            raise tokenize.TokenError(f"unexpected {bad[0]!r}")  # 3.12 raises this itself
    except (tokenize.TokenError, SyntaxError, UnicodeDecodeError) as e:
        raise ConfigError(f"text is not Python source ({e}): leave out code_tokens") from None
    for line in lines:
        line_starts.append(offset)
        offset += len(line.encode())
    starts = [token.start for token in tokens if token.type not in _LAYOUT_TOKENS]
    return inside(
        (line_starts[row - 1] + len(lines[row - 1][:column].encode()) for row, column in starts),
        len(data),
    )


RULES: dict[str, Callable[[bytes], tuple[int, ...]]] = {
    "characters": character_starts,
    "words": word_starts,
    "whitespace": whitespace_starts,
    "code_tokens": code_tokens,
}


def annotate(segmentation: Segmentation, *kinds: str) -> Segmentation:
    """Add gold boundaries by rule to a text; kinds that it already has are kept."""
    for kind in kinds:
        if kind not in RULES:
            raise ConfigError(f"gold kind {kind!r} follows no rule: use one of {', '.join(RULES)}")
    found = {k: RULES[k](segmentation.data) for k in kinds if k not in segmentation.gold}
    return replace(segmentation, gold={**segmentation.gold, **found})


def read_annotated(path: str | os.PathLike) -> Iterator[Segmentation]:
    """Read texts with gold boundaries; the name and the first line determine the form.

    ``*.words.tsv`` and ``*.sentences.tsv``: morphemes; ``*.py``: code; ``*.jsonl``: words, code or
    segmentations if the first line has "spans", "path" or "stages". Raises ConfigError for other
    files.
    """
    name = Path(path).name.lower()
    readers = {
        ".words.tsv": read_morph_words,
        ".sentences.tsv": read_morph_sentences,
        ".py": read_code,
    }
    if name.endswith(".jsonl"):
        readers = {"spans": read_ud, "path": read_code, "stages": read_segmentations}
        row = next((row for _, row in _json_lines(path)), {})
        name = next((key for key in readers if isinstance(row, dict) and key in row), "")
    for ending, read in readers.items():
        if name.endswith(ending):
            return iter(read(path))
    raise ConfigError(
        f"annotated file {os.fspath(path)!r} has no known form: use *.words.tsv, "
        '*.sentences.tsv, *.py, or *.jsonl with "spans", "path" or "stages"'
    )


def read_ud(path: str | os.PathLike) -> Iterator[Segmentation]:
    """Sentences with gold ``words`` and ``word_ends``.

    One JSON object per line: {"id", "text", "spans": [[start, end], ...]} with the UTF-8 byte
    offsets of each word, from a Universal Dependencies treebank.
    """
    for number, row in _json_lines(path):
        try:
            data = encode(row["text"])
            spans = [(_offset(a), _offset(b)) for a, b in row["spans"]]
            _check_spans(data, spans)
            gold = {
                "words": inside((a for a, _ in spans), len(data)),
                "word_ends": inside((b for _, b in spans), len(data)),
            }
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise _malformed(path, number, e) from None
        yield Segmentation(data, str(row.get("id", number)), gold=gold)


def _offset(value: Any) -> int:
    if type(value) is not int:  # a fraction or Infinity would be rounded, or raise another error
        raise ValueError(f"{shown(value)} is no offset")
    return value


def _check_spans(data: bytes, spans: Sequence[tuple[int, int]]) -> None:
    """Raise ValueError for spans that cannot be words, such as offsets in characters."""
    for a, b in spans:
        if not 0 <= a < b <= len(data):
            raise ValueError(f"span {[a, b]} is not inside the text of {len(data)} bytes")
        if data[a:b].strip() != data[a:b] or _cuts_character(data, (a, b)):
            raise ValueError(
                f"span {[a, b]} begins or ends with whitespace or inside a character: "
                "spans are UTF-8 byte offsets, not numbers of characters"
            )


def _cuts_character(data: bytes, offsets: tuple[int, ...]) -> bool:
    suspect = any(o < len(data) and data[o] & 0xC0 == 0x80 for o in offsets)
    return suspect and bool(inside_character(data, offsets))


def read_code(path: str | os.PathLike) -> Iterator[Segmentation]:
    """Python files with gold ``code_tokens``: a .py file, or {"path", "text"} JSON lines."""
    path = Path(path)
    if path.suffix.lower() != ".jsonl":
        yield annotate(Segmentation(_read(path).removeprefix(BOM), path.name), "code_tokens")
        return
    for number, row in _json_lines(path):
        try:
            text = Segmentation(encode(row["text"]), str(row["path"]))
        except (KeyError, TypeError, AttributeError) as e:
            raise _malformed(path, number, e) from None
        yield annotate(text, "code_tokens")


def read_morph_words(path: str | os.PathLike, *, exact_only: bool = True) -> Iterator[Segmentation]:
    """Words with gold ``morphemes``.

    Tab-separated lines: word, canonical morphemes, byte offsets of the boundaries in the word
    (comma-separated, "-" or empty for none), quality, then other columns. Quality ``exact``: the
    concatenated morphemes are the word. ``aligned`` offsets are estimates (silver) and are read
    only with exact_only=False; ``none`` rows are never read.
    """
    for number, row in _tab_lines(path, 4):
        if row[3] != "exact" and (exact_only or row[3] != "aligned"):
            continue
        data = row[0].encode()
        try:
            offsets = tuple(int(o) for o in row[2].split(",") if o not in ("", "-"))
            if not all(0 < o < len(data) for o in offsets) or _cuts_character(data, offsets):
                raise ValueError(f"{row[2]} are not UTF-8 byte offsets between its characters")
        except ValueError as e:
            raise _malformed(path, number, e) from None
        yield Segmentation(data, row[0], gold={"morphemes": inside(offsets, len(data))})


def read_morph_sentences(path: str | os.PathLike) -> Iterator[Segmentation]:
    """Sentences with gold ``words`` and ``morphemes``, if they are exact.

    Tab-separated lines: sentence, the sentence with its words split into canonical morphemes (a
    leading ``@@`` joins a morpheme to the one before), then other columns. A sentence with a word
    that is not the concatenation of its morphemes has no exact boundaries and is skipped.
    """
    for number, row in _tab_lines(path, 2):
        words, morphemes = _word_starts(row[0]), _morpheme_starts(row[0], row[1])
        if morphemes is not None:
            data = row[0].encode()
            gold = {"words": inside(words, len(data)), "morphemes": inside(morphemes, len(data))}
            yield Segmentation(data, f"{Path(path).name}:{number}", gold=gold)


def _word_starts(sentence: str) -> list[int]:
    """First byte of every word of a sentence with single spaces between words."""
    lengths = [len(word.encode()) + 1 for word in sentence.split(" ")]
    return [0, *itertools.accumulate(lengths[:-1])]


def _morpheme_starts(sentence: str, segmented: str) -> list[int] | None:
    """First byte of every morpheme, or None if they do not concatenate to the words."""
    pieces: list[list[str]] = []
    for piece in segmented.split(" "):
        if piece.startswith("@@") and pieces:
            pieces[-1].append(piece[2:])
        else:
            pieces.append([piece])
    if [("".join(p)) for p in pieces] != sentence.split(" "):
        return None
    starts = []
    for word_start, parts in zip(_word_starts(sentence), pieces):
        lengths = [len(p.encode()) for p in parts[:-1]]
        starts += itertools.accumulate([word_start, *lengths])
    return starts


def clip(segmentation: Segmentation, max_bytes: int) -> Segmentation:
    """The beginning of a text, at most `max_bytes` long, ending with a whole character.

    A text that is shortened keeps only its name and its gold boundaries.
    """
    if len(segmentation.data) <= max_bytes:
        return segmentation
    ends = [0, *character_starts(segmentation.data)]
    end = ends[bisect.bisect_right(ends, max_bytes) - 1]
    gold = {kind: inside(offsets, end) for kind, offsets in segmentation.gold.items()}
    return Segmentation(segmentation.data[:end], segmentation.name, gold=gold)


def thin(texts: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the texts, evenly spaced; all texts if `most` is 0."""
    count = min(most or len(texts), len(texts))
    return [texts[i * len(texts) // count] for i in range(count)]


def inside_character(data: bytes, offsets: tuple[int, ...]) -> tuple[int, ...]:
    """The offsets that are inside a UTF-8 character."""
    starts = [0, *character_starts(data), len(data)]
    return tuple(o for o in offsets if starts[bisect.bisect_left(starts, o)] != o)


def _read(path: Path) -> bytes:
    try:
        return read_bytes(path)
    except OSError as e:
        raise ConfigError(f"annotated file {os.fspath(path)!r}: {e.strerror}") from None


def _json_lines(path: str | os.PathLike) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(lines_of(_read(Path(path))), 1):
        if line.strip():
            try:
                row = parse(line)
            except ValueError as e:
                raise _malformed(path, number, e) from None
            yield number, row


def _tab_lines(path: str | os.PathLike, columns: int) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(lines_of(_read(Path(path))), 1):
        try:
            row = line.decode().split("\t")
        except UnicodeDecodeError as e:
            raise _malformed(path, number, f"it is not UTF-8 ({e})") from None
        if line:
            if len(row) < columns:
                raise _malformed(path, number, f"{len(row)} columns, not {columns}")
            yield number, row


def _malformed(path: str | os.PathLike, number: int, why: object) -> ConfigError:
    return ConfigError(f"annotated file {os.fspath(path)!r} line {number}: {why}")
