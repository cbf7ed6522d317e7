"""Continue texts with a trained model.

    python -m experiments.generate --checkpoint WORKDIR --prompt "Once upon a time"
    python -m experiments.generate --checkpoint WORKDIR             # asks, or reads lines of a pipe
    python -m experiments.generate --checkpoint WORKDIR --input prompts.jsonl --output texts.jsonl

A checkpoint is a work directory or an official state dict with its JSON. Text is printed as it is
generated, in whole characters; --boundaries True prints it with its chunks once it is complete.
Input lines are objects with "prompt" and optionally "seed"; output lines repeat the prompt and add
"text", "finish_reason", "logprobs" (nats, one number per byte) and "starts" (byte offsets in prompt
+ text at which the chunks of each stage start) and "made_by", a hash of the model and the settings.
A text that is not valid UTF-8 comes as "base64".
"""

import base64
import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

from rich.progress import Progress

from hnet.bounds import FilePath, Rows
from hnet.command_line import parse
from hnet.commands.prompt_file import (
    already_done,
    is_begun_file,
    made_by,
    opened,
    opened_prompts,
    own_fields,
)
from hnet.data.forms import BOM
from hnet.decode.generate import Generation, chunk_starts, stream_text
from hnet.decode.prompts import encode
from hnet.decode.sampling import Sampling
from hnet.errors import ConfigError
from hnet.files import json_text
from hnet.inspect.render import print_segmentations
from hnet.inspect.segmentation import Segmentation, StageBoundaries
from hnet.interop import load
from hnet.model import HNetLM
from hnet.outputs import one_line
from hnet.printable import printable
from hnet.runtime.compile_cache import enable_compilation_cache


@dataclass(frozen=True)
class GenerateConfig:
    """What to continue and how."""

    checkpoint: FilePath
    """WORKDIR or WORKDIR@STEP of a run, an official checkpoint with its JSON, or hf://OWNER/NAME"""
    prompt: str | None = None
    """text to continue, possibly empty; without it, lines are read from the terminal or a pipe, and
    blank lines are skipped"""
    input: FilePath | None = None
    """JSONL file of prompts"""
    output: FilePath | None = None
    """JSONL file of results; it must not exist, except with --resume"""
    resume: bool = False
    """continue an output file that was not finished"""
    batch_size: Rows = 32
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
    if (config.input is None) != (config.output is None):
        raise ConfigError("input and output belong together: give both, or a prompt")
    if config.input is not None:
        _run_file(config)
        return
    model = _load(config)
    if config.prompt is not None:
        _run_prompt(model, config, encode(config.prompt))
    else:
        _converse(model, config)


def _load(config: GenerateConfig) -> HNetLM:
    enable_compilation_cache()
    return load(config.checkpoint, dtype=config.dtype or None, ema=config.ema)


def _run_prompt(model: HNetLM, config: GenerateConfig, prompt: bytes) -> None:
    """Print the continuation as it is generated, or all of it with its chunks at the end."""
    pieces = stream_text(model, [prompt], config.sampling, bos=config.bos)
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
    pieces = itertools.chain(sys.stdin.buffer, [b""])  # the first one may begin with a mark
    first = next(pieces).removeprefix(BOM)
    lines = (line.rstrip(b"\r\n") for line in itertools.chain([first], pieces))
    lines = (line for line in lines if line.strip())
    if not (first := next(lines, b"")):
        raise ConfigError("there is nothing to continue: give --prompt, or --input and --output")
    yield from itertools.chain([first], lines)


def _run_file(config: GenerateConfig) -> None:
    """Continue the prompts of a file that have no result yet."""
    with opened_prompts(config.input) as (prompts, total):
        if is_begun_file(config.output, resume=config.resume):
            with opened(config.output, "r+b") as file:
                begun = already_done(config.input, config.output, prompts, file)
                model = _load(config)
                by = made_by(model, config.sampling, config.bos)
                done = begun.go_on(file, by, config.output)
                _write_results(model, config, begun.prompts, done, total, file, by)
        else:
            model = _load(config)
            with opened(config.output, "xb") as file:
                by = made_by(model, config.sampling, config.bos)
                _write_results(model, config, prompts, 0, total, file, by)
    print(f"wrote {config.output}")


def _write_results(
    model: HNetLM, config: GenerateConfig, prompts: Iterator[dict[str, Any]], done: int,
    total: int | None, file: BinaryIO, made_by: str,
) -> None:  # fmt: skip
    """Continue prompts, of which `done` came before, and write a line for each in their order."""
    first, taken, finished = done, {}, {}

    def texts() -> Iterator[str]:
        for i, prompt in enumerate(prompts, first):
            taken[i] = prompt
            yield prompt["prompt"]

    def seeds() -> Iterator[int]:  # asked for after the prompt
        for i in itertools.count(first):
            yield int(taken[i].get("seed", config.sampling.seed + i))

    pieces = stream_text(
        model, texts(), config.sampling, seeds=seeds(), bos=config.bos,
        batch_size=config.batch_size,
    )  # fmt: skip
    with (
        Progress(disable=not sys.stderr.isatty(), transient=True) as progress,
        one_line(config.output, "output"),
    ):
        task = progress.add_task("generating", total=total, completed=done)
        for piece in pieces:
            if piece.finished is None:
                continue
            finished[first + piece.index] = piece.finished
            progress.advance(task)
            while done in finished:
                line = _line(model, taken.pop(done), finished.pop(done)) | {"made_by": made_by}
                file.write(json_text(line).encode() + b"\n")
                file.flush()
                done += 1


def _line(model: HNetLM, prompt: dict[str, Any], result: Generation) -> dict[str, Any]:
    try:
        text = {"text": result.data.decode()}
    except UnicodeDecodeError:
        text = {"base64": base64.b64encode(result.data).decode()}
    return {
        **own_fields(prompt),
        **text,
        "finish_reason": result.finish_reason,
        "logprobs": [round(float(x), 5) for x in result.logprobs],
        "starts": chunk_starts(model.config, result.boundaries),
    }
