"""Files of prompts and of their results, as `generate --input FILE --output FILE` uses them."""

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import jax
import numpy as np

from hnet.data.forms import lines_of
from hnet.decode.sampling import Sampling
from hnet.errors import ConfigError
from hnet.fields import to_json
from hnet.files import json_text, parse_json
from hnet.model import HNetLM, split
from hnet.outputs import new_file, one_line, read_file

RESULTS = ("text", "base64", "finish_reason", "logprobs", "starts")
"""fields of an output line besides those of its prompt and "made_by\""""
HASHED = 4096  # values of each parameter that the hash of a model covers


class Begun(NamedTuple):
    """An output file that an earlier command has begun."""

    done: int
    """number of finished lines"""
    size: int
    """their bytes; an incomplete line, left by a killed command, follows"""
    made_by: str | None
    """hash in these lines (`made_by`); None if unknown"""

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


def read_prompts(path: str) -> list[dict[str, Any]]:
    """The objects of a JSONL file; blank lines are skipped."""
    prompts = []
    for number, line in enumerate(lines_of(read_file(path, "input")), 1):
        if not line.strip():
            continue
        try:
            item = parse_json(line.decode("utf-8"))
            valid = isinstance(item["prompt"], str) and 0 <= int(item.get("seed", 0)) < 1 << 32
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
        prompts.append(item)
    if not prompts:
        raise ConfigError(f'input={path!r}: it is empty: give lines such as {{"prompt": "a"}}')
    return prompts


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
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the process ends
        except BlockingIOError:
            raise ConfigError(
                f"output={output!r} is being written by another process: wait for it"
            ) from None
        yield file


def already_done(input_: str, output: str, prompts: list[dict[str, Any]], file: BinaryIO) -> Begun:
    """What an output file has. Raises ConfigError for a file that this command did not write for
    these prompts."""
    where = f"output={output!r}"
    content = file.read()
    *whole, rest = content.split(b"\n")
    starts = list(map(_line_start, prompts))
    if (
        os.path.samefile(input_, output)
        or len(whole) + bool(rest) > len(prompts)
        or not all(map(_is_result, whole, starts))
        or (rest and not _is_begun(rest, starts[len(whole)]))
    ):
        raise ConfigError(f"{where} holds no results of these prompts: choose another file")
    return Begun(len(whole), len(content) - len(rest), _maker(whole))


def _maker(lines: Sequence[bytes]) -> str | None:
    """The "made_by" of finished lines; None if there is none, or of an earlier version."""
    found = [parse_json(line).get("made_by") for line in lines]
    return "several" if any(each != found[0] for each in found) else next(iter(found), None)


def _line_start(prompt: dict[str, Any]) -> bytes:
    """The beginning of a prompt's output line, which is known before generating."""
    known = itertools.takewhile(lambda item: item[0] not in (*RESULTS, "made_by"), prompt.items())
    return json_text(dict(known))[:-1].encode()


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
