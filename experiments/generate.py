"""Continue texts with a trained model.

    python -m experiments.generate --checkpoint WORKDIR --prompt "Once upon a time"
    python -m experiments.generate --checkpoint WORKDIR             # asks, or reads lines of a pipe
    python -m experiments.generate --checkpoint WORKDIR --input prompts.jsonl --output texts.jsonl

A checkpoint is a work directory or an official state dict with its JSON. Text is printed as it
comes, whole characters only; --boundaries True prints prompt and text once more with their chunks.
Input lines are objects with "prompt" and perhaps "seed"; output lines repeat the prompt and add
"text", "finish_reason", "logprobs" (nats, a number a byte) and "starts" (byte offsets in prompt +
text at which the chunks of each stage start). A text that is not valid UTF-8 comes as "base64".
"""

import base64
import dataclasses
import itertools
import json
import sys
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from hnet.command_line import parse, run
from hnet.errors import ConfigError
from hnet.infer.generate import Generation, chunk_starts, stream_text
from hnet.infer.sampling import Sampling
from hnet.inspect.render import print_segmentations
from hnet.inspect.segmentation import Segmentation, StageBoundaries
from hnet.interop import load
from hnet.model import HNetLM
from hnet.train.compile_cache import enable_compilation_cache


@dataclass(frozen=True)
class GenerateConfig:
    """What to continue and how."""

    checkpoint: str
    """work directory of a run, or an official checkpoint with its JSON"""
    prompt: str | None = None
    """text to continue, possibly empty; without one, lines are read from the terminal or a pipe"""
    input: str = ""
    """JSONL file of prompts"""
    output: str = ""
    """JSONL file of results; it must not exist, but see resume"""
    resume: bool = False
    """continue an output file that was not finished"""
    batch_size: int = 32
    """prompts of the input file that run together"""
    bos: bool = True
    """put byte 254 before the prompt, as in training; False for models trained without it"""
    boundaries: bool = False
    """print the text with its chunk boundaries too"""
    dtype: str = ""
    """float32 or bfloat16; empty = as trained"""
    sampling: Sampling = Sampling()


def main() -> None:
    config = parse(GenerateConfig)
    if bool(config.input) != bool(config.output):
        raise ConfigError("input and output belong together: give both, or a prompt")
    if config.input:
        prompts, done = _read_prompts(config.input), _already_done(config)
    enable_compilation_cache()
    model = load(config.checkpoint, dtype=config.dtype or None)
    if config.input:
        _run_file(model, config, prompts, done)
    elif config.prompt is not None:
        _run_prompt(model, config, config.prompt)
    else:
        _converse(model, config)


def _run_prompt(model: HNetLM, config: GenerateConfig, prompt: str) -> None:
    """Print the continuation as it comes."""
    show = _visible if sys.stdout.isatty() else str
    pieces = stream_text(model, [prompt], config.sampling, bos=config.bos, block_len=8)
    first = next(pieces)  # what is refused is refused before anything is printed
    print(show(prompt), end="")
    for piece in itertools.chain([first], pieces):
        print(show(piece.text), end="", flush=True)
    print()
    if config.boundaries:
        print_segmentations([_segmentation(model, piece.finished)])


def _visible(text: str) -> str:
    """Text that cannot steer a terminal: control and direction characters are spelled out."""
    return "".join(
        f"\\u{{{ord(c):04x}}}" if unicodedata.category(c) in ("Cc", "Cf") and c not in "\n\t" else c
        for c in text
    )


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
    """Continue lines that are typed, or come through a pipe."""
    if typed := sys.stdin.isatty():
        print("Type a text to continue; an empty line or Ctrl-D ends.", file=sys.stderr)
    seed = config.sampling.seed
    while True:
        try:
            prompt = input("> " if typed else "")
        except EOFError:
            prompt = ""
        if not prompt:
            break
        sampling = dataclasses.replace(config.sampling, seed=seed)
        _run_prompt(model, dataclasses.replace(config, sampling=sampling), prompt)
        seed += 1
    if not typed and seed == config.sampling.seed:
        raise ConfigError("there is nothing to continue: give --prompt, or --input and --output")


def _read_prompts(path: str) -> list[dict[str, Any]]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "is not UTF-8"
        raise ConfigError(f"input={path!r}: {reason}") from None
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            item = json.loads(line)
            valid = isinstance(item["prompt"], str) and 0 <= int(item.get("seed", 0)) < 1 << 32
        except (ValueError, KeyError, TypeError, AttributeError):
            valid = False
        if not valid:
            raise ConfigError(
                f'input={path!r}: line {number} is no object with a text "prompt" and perhaps a '
                'whole number "seed"'
            )
        prompts.append(item)
    return prompts


def _already_done(config: GenerateConfig) -> int:
    """Finished lines of the output file; one that was cut off while written is removed."""
    path = Path(config.output)
    if not path.exists():
        return 0
    if not config.resume:
        raise ConfigError(
            f"output={config.output!r} exists: choose another file, or set resume True to finish it"
        )
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        path.write_bytes(whole)
    return whole.count(b"\n")


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
        open(config.output, "a", encoding="utf-8") as file,
    ):
        task = progress.add_task("generating", total=len(prompts), completed=done)
        for piece in pieces:
            if piece.finished is None:
                continue
            waiting[first + piece.index] = piece.finished
            progress.advance(task)
            while done in waiting:  # lines keep the order of the prompts
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


if __name__ == "__main__":
    run(main)
