"""Files of prompts and of their results, as `generate --input FILE --output FILE` uses them."""

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import jax
import numpy as np

from hnet.data.forms import BOM
from hnet.decode.prompts import encode
from hnet.decode.sampling import Sampling
from hnet.errors import ConfigError
from hnet.fields import to_json
from hnet.files import json_text, open_bytes, parse_json
from hnet.model import HNetLM, split
from hnet.outputs import lock, new_file, one_line

RESULTS = ("text", "base64", "finish_reason", "logprobs", "starts")
"""fields of an output line besides those of its prompt and "made_by\""""
MOST_LINE = 64 << 20  # bytes of a line of prompts
READ_AHEAD = 16 << 20  # characters of the prompts of a pipe that are checked before any work
HASHED = 4096  # values of each parameter that the hash of a model covers


class Begun(NamedTuple):
    """An output file that an earlier command has begun."""

    done: int
    """number of finished lines"""
    size: int
    """their bytes; an incomplete line, left by a killed command, follows"""
    made_by: str | None
    """hash in these lines (`made_by`); None if there is none, or of an earlier version"""
    prompts: Iterator[dict[str, Any]]
    """those without a finished line"""

    def go_on(self, file: BinaryIO, made_by: str, output: str) -> int:
        """Remove the incomplete line; returns `done`. Raises ConfigError if another model, or other
        settings, wrote the finished lines."""
        if self.made_by not in (None, made_by):
            raise ConfigError(
                f"output={output!r} was made by another model or with other settings "
                f"(fingerprint {self.made_by}, now {made_by}): use those, or another file"
            )
        file.seek(self.size)
        file.truncate()
        return self.done


def made_by(model: HNetLM, sampling: Sampling, bos: bool | None) -> str:
    """Hash of the model and the settings that its texts depend on."""
    own = model.bos if bos is None else bos
    settings = json_text([to_json(model.config), to_json(sampling), own])
    digest = hashlib.blake2b(settings.encode(), digest_size=8)
    for leaf in jax.tree.leaves(split(model)[1]):
        digest.update(np.asarray(leaf).reshape(-1)[:HASHED].tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def opened_prompts(path: str) -> Iterator[tuple[Iterator[dict[str, Any]], int | None]]:
    """(objects of a JSONL file or pipe, read while they are taken; their number, None if unknown).

    A file is read to its end before, so that a bad line is named before any work; a pipe up to
    `READ_AHEAD` bytes. Blank lines are skipped. Raises ConfigError, also while objects are taken.
    """
    with contextlib.ExitStack() as stack:
        with one_line(path, "input"):
            file = stack.enter_context(open_bytes(path))
        prompts = _prompts(path, file)
        if file.seekable():
            total = sum(1 for _ in prompts)
            file.seek(0)
            yield _prompts(path, file), total
            return
        ahead, size = [], 0
        for prompt in prompts:
            ahead.append(prompt)
            size += len(prompt["prompt"])
            if size >= READ_AHEAD:
                yield itertools.chain(ahead, prompts), None
                return
        yield iter(ahead), len(ahead)


def _prompts(path: str, file: BinaryIO) -> Iterator[dict[str, Any]]:
    """The objects of the lines from here on, at least one."""
    number, found = 0, False
    while line := _line(path, file, number + 1):
        number += 1
        line = line.removeprefix(BOM) if number == 1 else line
        if not line.strip():
            continue
        try:
            item = parse_json(line.decode("utf-8"))
            valid = isinstance(item["prompt"], str) and 0 <= int(item.get("seed", 0)) < 1 << 32
            encode(item["prompt"])
            json.dumps(item)
        except UnicodeDecodeError:
            raise ConfigError(f"input={path!r}: line {number} is not UTF-8") from None
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            valid = False
        if not valid:
            raise ConfigError(
                f'input={path!r}: line {number} is no object with a text "prompt" and perhaps a '
                'whole number "seed"'
            )
        found = True
        yield item
    if not found:
        raise ConfigError(f'input={path!r}: it is empty: give lines such as {{"prompt": "a"}}')


def _line(path: str, file: BinaryIO, number: int) -> bytes:
    """The next line; empty at the end."""
    with one_line(path, "input"):
        line = file.readline(MOST_LINE)
    if len(line) == MOST_LINE:
        raise ConfigError(f"input={path!r}: line {number} is longer than {MOST_LINE >> 20} MiB")
    return line


def is_begun_file(output: str, *, resume: bool) -> bool:
    """Whether the output file exists. Raises ConfigError if it may not, or cannot be created."""
    if not os.path.lexists(output):
        new_file(output, "output")
        return False
    if not resume:
        raise ConfigError(
            f"output={output!r} exists: choose another file, or set resume True to finish it"
        )
    if not os.path.isfile(output):
        raise ConfigError(f"output={output!r} is no file: choose another")
    return True


@contextlib.contextmanager
def opened(output: str, mode: str) -> Iterator[BinaryIO]:
    """The output file; no other process can write it meanwhile. Raises ConfigError."""
    with contextlib.ExitStack() as stack:
        with one_line(output, "output"):
            file = stack.enter_context(open(output, mode))
        lock(file, f"output={output!r}")
        yield file


def already_done(
    input_: str, output: str, prompts: Iterator[dict[str, Any]], file: BinaryIO
) -> Begun:
    """What an output file has; takes the prompts of its lines. Raises ConfigError for a file that
    this command did not write for these prompts."""
    done, size, makers = 0, 0, set()
    other = ConfigError(f"output={output!r} holds no results of these prompts: choose another file")
    with one_line(input_, "input"):
        if "://" not in input_ and os.path.samefile(input_, output):
            raise other
    for line in file:
        if (prompt := next(prompts, None)) is None:
            raise other
        start = _line_start(prompt)
        if not line.endswith(b"\n"):
            if not _is_begun(line, start):
                raise other
            prompts = itertools.chain([prompt], prompts)
            break
        if not _is_result(line, start):
            raise other
        makers.add(parse_json(line).get("made_by"))
        done, size = done + 1, size + len(line)
    made_by = "several" if len(makers) > 1 else next(iter(makers), None)
    return Begun(done, size, made_by, prompts)


def own_fields(prompt: dict[str, Any]) -> dict[str, Any]:
    """The fields of a prompt that its output line repeats: those that are no results."""
    return {k: v for k, v in prompt.items() if k not in (*RESULTS, "made_by")}


def _line_start(prompt: dict[str, Any]) -> bytes:
    """The beginning of a prompt's output line, which is known before generating."""
    return json_text(own_fields(prompt))[:-1].encode()


def _is_result(line: bytes, start: bytes) -> bool:
    try:
        return line.startswith(start) and {*RESULTS[2:]} <= parse_json(line).keys()
    except (ValueError, AttributeError):
        return False


def _is_begun(line: bytes, start: bytes) -> bool:
    """Whether this may be the incomplete line of a command that was killed while writing it."""
    try:
        parse_json(line)
    except ValueError:
        return line.startswith(start) or start.startswith(line)
    return _is_result(line, start)
