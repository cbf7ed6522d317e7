"""Show the chunks of a trained model in a text, or the tokens of a model of tokens.

    python -m experiments.segment --checkpoint WORKDIR --text "some text" [more ...]
    python -m experiments.segment --checkpoint WORKDIR --file FILE [--html PAGE.html]

Colours in a terminal, marks (| for stage 0, deeper ones for inner stages) when piped. --json gives
byte offsets and probabilities, --html a self-contained page. Without --text and --file, standard
input is read.
"""

import os
import sys
from dataclasses import dataclass, replace

from hnet import load
from hnet.bounds import Count, FilePath
from hnet.command_line import parse
from hnet.data.forms import lines_of
from hnet.data.parallel import read_lines
from hnet.data.tokens import read_vocabulary, starts
from hnet.decode.segment import segment_all, segmenter
from hnet.errors import ConfigError
from hnet.files import json_text
from hnet.inspect.fairness import cut_at
from hnet.inspect.gold import annotate
from hnet.inspect.page import to_html
from hnet.inspect.render import print_segmentations
from hnet.inspect.segmentation import Segmentation
from hnet.model import split
from hnet.outputs import new_file, write_new
from hnet.runtime.compile_cache import enable_compilation_cache

GOLD = ("words", "whitespace", "characters")


@dataclass(frozen=True)
class SegmentConfig:
    """Which text to segment and how to show it."""

    checkpoint: FilePath
    """WORKDIR or WORKDIR@STEP of a run, an official checkpoint with its JSON, or hf://OWNER/NAME"""
    text: tuple[str, ...] = ()
    """texts to segment"""
    file: FilePath | None = None
    """file whose lines are segmented one by one, in a form of `data.files`; - = standard input"""
    json: bool = False
    """print one JSON object per text instead"""
    html: FilePath | None = None
    """output file for a page; it must not exist"""
    ema: bool = False
    """whether to take the moving average of the run's parameters (optim.ema_decay)"""
    bos: bool | None = None
    """whether to put BOS (byte 254) before each text; None = as in training"""
    max_bytes: Count = 4096
    """length at which longer texts are truncated"""


def main() -> None:
    config = parse(SegmentConfig)
    if config.html is not None:
        new_file(config.html, "html")
    texts = _texts(config)
    enable_compilation_cache()
    model = load(config.checkpoint, bos=config.bos, ema=config.ema)
    if model.tokenizer and not model.config.num_chunked:
        vocabulary = read_vocabulary(model.tokenizer)
        found = [cut_at(text, starts(vocabulary, text)) for text in texts]
    else:
        graph, params = split(model)
        found = segment_all(segmenter(graph, model.config, bos=model.bos), params, texts)
    found = [annotate(replace(seg, name=f"text {n}"), *GOLD) for n, seg in enumerate(found, 1)]
    if config.html is not None:
        _write_page(config, found)
    elif config.json:
        for seg in found:
            print(json_text(seg.to_json()))
    else:
        print_segmentations(found)


def _texts(config: SegmentConfig) -> list[bytes]:
    texts = [text.encode("utf-8", "surrogateescape") for text in config.text]
    if config.file == "-" or not (config.text or config.file):
        texts += lines_of(sys.stdin.buffer.read())
    elif config.file:
        texts += read_lines(config.file, "file")
    texts = [text[: config.max_bytes] for text in texts if text]
    if not texts:
        raise ConfigError("there is no text to cut: give --text or --file")
    return texts


def _write_page(config: SegmentConfig, found: list[Segmentation]) -> None:
    # The page may be shared: show no folders of this machine.
    name = os.path.basename(os.path.abspath(config.checkpoint))
    page = to_html({name: found}, title=f"Chunk boundaries of {name}")
    write_new(config.html, page, "html")
    print(f"wrote {config.html}")
