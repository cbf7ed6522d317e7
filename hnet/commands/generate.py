"""Continue texts with a trained model.

    python -m experiments.generate --checkpoint WORKDIR --prompt "Once upon a time"
    python -m experiments.generate --checkpoint WORKDIR             # asks, or reads lines of a pipe
    python -m experiments.generate --checkpoint WORKDIR --input prompts.jsonl --output texts.jsonl

A checkpoint is a work directory or an official state dict with its JSON. Text is printed as it is
generated, in whole characters; --boundaries True prints it with its chunks once it is complete.
Input lines are objects with "prompt" and optionally "seed"; output lines repeat the prompt and add
"text", "finish_reason", "logprobs" (nats, one number per byte) and "starts" (byte offsets in prompt
+ text at which the chunks of each stage start). A text that is not valid UTF-8 comes as "base64".
"""

import base64
import contextlib
import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.progress import Progress

from hnet.command_line import parse
from hnet.decode.generate import Generation, chunk_starts, stream_text
from hnet.decode.prompts import encode
from hnet.decode.sampling import Sampling
from hnet.errors import ConfigError
from hnet.fields import Count, parse_json
from hnet.inspect.render import print_segmentations
from hnet.inspect.segmentation import Segmentation, StageBoundaries
from hnet.interop import load
from hnet.model import HNetLM
from hnet.outputs import new_file, one_line, read_file
from hnet.printable import printable
from hnet.runtime.compile_cache import enable_compilation_cache

RESULTS = ("text", "base64", "finish_reason", "logprobs", "starts")


@dataclass(frozen=True)
class GenerateConfig:
    """What to continue and how."""

    checkpoint: str
    """WORKDIR or WORKDIR@STEP of a run, an official checkpoint with its JSON, or hf://OWNER/NAME"""
    prompt: str | None = None
    """text to continue, possibly empty; without it, lines are read from the terminal or a pipe, and
    blank lines are skipped"""
    input: str = ""
    """JSONL file of prompts"""
    output: str = ""
    """JSONL file of results; it must not exist, except with --resume"""
    resume: bool = False
    """continue an output file that was not finished"""
    batch_size: Count = 32
    """number of prompts of the input file that run together"""
    ema: bool = False
    """whether to take the moving average of the run's parameters (optim.ema_decay)"""
    bos: bool | None = None
    """whether to put BOS (byte 254) before the prompt; None = as in training"""
    boundaries: bool = False
    """print the text with its chunk boundaries, once it is complete"""
    dtype: str = ""
    """float32 or bfloat16; empty = as trained"""
    sampling: Sampling = Sampling()


def main() -> None:
    config = parse(GenerateConfig)
    if bool(config.input) != bool(config.output):
        raise ConfigError("input and output belong together: give both, or a prompt")
    if config.input:
        prompts = _read_prompts(config.input)
        done = _already_done(config, prompts)
    enable_compilation_cache()
    model = load(config.checkpoint, dtype=config.dtype or None, ema=config.ema)
    if config.input:
        _run_file(model, config, prompts, done)
    elif config.prompt is not None:
        _run_prompt(model, config, encode(config.prompt))
    else:
        _converse(model, config)


def _run_prompt(model: HNetLM, config: GenerateConfig, prompt: bytes) -> None:
    """Print the continuation as it is generated, or all of it with its chunks at the end."""
    pieces = stream_text(model, [prompt], config.sampling, bos=config.bos, block_len=8)
    if config.boundaries:
        *_, last = pieces
        print_segmentations([_segmentation(model, last.finished)])
        return
    show = partial(printable, keep="\n\t") if sys.stdout.isatty() else str
    first = next(pieces)  # errors are raised before anything is printed
    print(show(prompt.decode(errors="replace")), end="")
    for piece in itertools.chain([first], pieces):
        print(show(piece.text), end="", flush=True)
    print()


def _segmentation(model: HNetLM, result: Generation) -> Segmentation:
    data = result.prompt + result.data
    stages, positions = [], range(len(data))
    for starts in chunk_starts(model.config, result.boundaries):
        cut = set(starts)
        probs = tuple(float(position in cut) for position in positions)
        stages.append(StageBoundaries(tuple(starts), probs))
        positions = starts
    return Segmentation(data, result.finish_reason, tuple(stages))


def _converse(model: HNetLM, config: GenerateConfig) -> None:
    """Continue lines that are typed or read from a pipe."""
    lines = _typed_lines() if sys.stdin.isatty() else _piped_lines()
    for seed, prompt in enumerate(lines, config.sampling.seed):
        sampling = dataclasses.replace(config.sampling, seed=seed)
        _run_prompt(model, dataclasses.replace(config, sampling=sampling), prompt)


def _typed_lines() -> Iterator[bytes]:
    print("Type a text to continue; an empty line or Ctrl-D ends.", file=sys.stderr)
    sys.stdin.reconfigure(errors="surrogateescape")
    with contextlib.suppress(EOFError):
        while line := input("> "):
            yield encode(line)


def _piped_lines() -> Iterator[bytes]:
    """Lines that are not blank, as raw bytes. Raises ConfigError if there are none."""
    lines = (line.rstrip(b"\r\n") for line in sys.stdin.buffer)
    lines = (line for line in lines if line.strip())
    if not (first := next(lines, b"")):
        raise ConfigError("there is nothing to continue: give --prompt, or --input and --output")
    yield from itertools.chain([first], lines)


def _read_prompts(path: str) -> list[dict[str, Any]]:
    """The objects of a JSONL file; blank lines are skipped."""
    prompts = []
    for number, line in enumerate(read_file(path, "input").split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            item = parse_json(line.decode("utf-8"))
            valid = isinstance(item["prompt"], str) and 0 <= int(item.get("seed", 0)) < 1 << 32
            json.dumps(item)
        except UnicodeDecodeError:
            raise ConfigError(f"input={path!r}: line {number} is not UTF-8") from None
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
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


def _already_done(config: GenerateConfig, prompts: list[dict[str, Any]]) -> int:
    """Number of finished lines of the output file. An incomplete last line, left by a killed run,
    is removed. Raises ConfigError for a file that this command did not write for these prompts."""
    where = f"output={config.output!r}"
    if not (config.resume and os.path.lexists(config.output)):
        if os.path.lexists(config.output):
            raise ConfigError(
                f"{where} exists: choose another file, or set resume True to finish it"
            )
        new_file(config.output, "output")
        return 0
    content = read_file(config.output, "output")
    *whole, rest = content.split(b"\n")
    starts = list(map(_line_start, prompts))
    if (
        os.path.samefile(config.input, config.output)
        or len(whole) + bool(rest) > len(prompts)
        or not all(map(_is_result, whole, starts))
        or (rest and not _is_begun(rest, starts[len(whole)]))
    ):
        raise ConfigError(f"{where} holds no results of these prompts: choose another file")
    if rest:
        with one_line(config.output, "output"), open(config.output, "r+b") as file:
            file.truncate(len(content) - len(rest))
    return len(whole)


def _line_start(prompt: dict[str, Any]) -> bytes:
    """The beginning of a prompt's output line, which is known before generating."""
    known = itertools.takewhile(lambda item: item[0] not in RESULTS, prompt.items())
    return json.dumps(dict(known))[:-1].encode()


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


def _run_file(
    model: HNetLM, config: GenerateConfig, prompts: list[dict[str, Any]], done: int
) -> None:
    seeds = [int(p.get("seed", config.sampling.seed + i)) for i, p in enumerate(prompts)]
    pieces = stream_text(
        model, [p["prompt"] for p in prompts[done:]], config.sampling,
        seeds=seeds[done:], bos=config.bos, batch_size=config.batch_size,
    )  # fmt: skip
    first, waiting = done, {}
    with (
        Progress(disable=not sys.stderr.isatty(), transient=True) as progress,
        one_line(config.output, "output"),
        open(config.output, "a" if config.resume else "x", encoding="utf-8") as file,
    ):
        task = progress.add_task("generating", total=len(prompts), completed=done)
        for piece in pieces:
            if piece.finished is None:
                continue
            waiting[first + piece.index] = piece.finished
            progress.advance(task)
            while done in waiting:  # write lines in the order of the prompts
                file.write(_line(model, prompts[done], waiting.pop(done)) + "\n")
                file.flush()
                done += 1
    print(f"wrote {config.output}")


def _line(model: HNetLM, prompt: dict[str, Any], result: Generation) -> str:
    try:
        text = {"text": result.data.decode()}
    except UnicodeDecodeError:
        text = {"base64": base64.b64encode(result.data).decode()}
    return json.dumps(
        {
            **prompt,
            **text,
            "finish_reason": result.finish_reason,
            "logprobs": [round(float(x), 5) for x in result.logprobs],
            "starts": chunk_starts(model.config, result.boundaries),
        }
    )
