"""What a trained system does with held-out text: boundaries, decoding, valid UTF-8."""

import codecs
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from experiments.compare.match import flops_per_byte, parameters
from experiments.compare.settings import Compare
from experiments.compare.systems import System, command
from hnet import load
from hnet.data import Part
from hnet.data.tokens import read_vocabulary, starts
from hnet.decode.generate import generate
from hnet.decode.sampling import Sampling
from hnet.decode.segment import segmenter
from hnet.errors import ConfigError
from hnet.inspect.fairness import cut_at
from hnet.inspect.gold import annotate, clip, read_annotated, thin
from hnet.inspect.metrics import boundary_scores
from hnet.inspect.segmentation import Segmentation
from hnet.inspect.tags import without_folders
from hnet.model import HNetLM, split
from hnet.suites.command import passages
from hnet.suites.items import Settings
from hnet.train.config import Config

GOLD_TEXTS = 500  # texts per annotated file, at most
ROWS = 32  # texts per batch
RULES = ("whitespace", "words")  # starts of white space and of words, known without annotation
PROMPT_BYTES = 32
PERCENTILES = (10, 50, 90)

Row = dict[str, Any]


def read_gold(settings: Compare) -> dict[str, list[Segmentation]]:
    """Annotated texts by file. Raises ConfigError for a file without texts that can be used."""
    found = {}
    for path in settings.gold:
        texts = thin([seg for seg in read_annotated(path) if seg.data], GOLD_TEXTS)
        if not texts:
            raise ConfigError(f"gold={path!r} has no text that can be used: give another file")
        found[path] = [clip(replace(seg, stages=()), settings.passage_bytes) for seg in texts]
    return found


def measure(
    settings: Compare,
    system: System,
    run: Config,
    trained: Row,
    heldout: Part,
    gold: dict[str, list[Segmentation]],
) -> Row:
    """The row of a trained run, plain JSON. trained: its record from `train_system`."""
    texts = passages(heldout, Settings(settings.passages, max_bytes=settings.passage_bytes))
    model = load(run.workdir)
    stages = range(run.model.num_chunked)
    sizes = trained["bytes_per_chunk"]
    rates = [min(1.0, before / size) for before, size in zip([1.0, *sizes], sizes)]
    again = f"{settings.workdir}-again/{system.folder_name}-seed{run.seed}"
    row = {
        "system": system.name,
        "seed": run.seed,
        **trained,
        "parameters": parameters(run.model),
        "widths": [stage.d_model for stage in run.model.stages],
        "flops_per_byte": flops_per_byte(run, tuple(rates), system.bytes_per_position),
        "train_bytes": round(
            run.train.steps * run.data.batch_size * run.data.seq_len * system.bytes_per_position
        ),
        "rates": [{"wanted": system.wanted(s), "achieved": 1 / rates[s]} for s in stages],
        "command": command(replace(run, workdir=again), system.network),
    }
    cut = cutter(run, model, settings.passage_bytes)
    found = cut(texts)
    row["chunks"] = [chunk_sizes(found, s) for s in range(len(found[0].stages))] if found else []
    row["agreement"] = agreement([annotate(seg, *RULES) for seg in found], RULES)
    row["gold"], names = {}, without_folders(gold)
    for path, own in gold.items() if found else ():
        cuts = cut([seg.data for seg in own])
        marked = [replace(seg, gold=text.gold) for seg, text in zip(cuts, own)]
        kinds = sorted({k for seg in own for k, at in seg.gold.items() if at})
        row["gold"][names[path]] = agreement(marked, kinds)
    return row | decoding(settings, run, model, texts)


def cutter(
    run: Config, model: HNetLM, longest: int
) -> Callable[[Sequence[bytes]], list[Segmentation]]:
    """Function from texts of at most `longest` bytes to their chunks: the model's, or its tokens;
    [] without chunks."""
    if run.data.tokenizer:
        vocabulary = read_vocabulary(run.data.tokenizer)
        return lambda texts: [cut_at(text, starts(vocabulary, text)) for text in texts]
    if not run.model.num_chunked:
        return lambda texts: []
    graph, params = split(model)
    segment = segmenter(graph, run.model, bos=run.data.bos_eos)

    def cut(texts: Sequence[bytes]) -> list[Segmentation]:
        found = []
        for first in range(0, len(texts), ROWS - 1):
            part = texts[first : first + ROWS - 1]
            # One text of full length and no fewer rows, so that all batches have one shape.
            rows = [*part, b" " * longest, *[b""] * (ROWS - 1 - len(part))]
            found += segment(params, rows)[: len(part)]
        return found

    return cut


def chunk_sizes(found: Sequence[Segmentation], stage: int) -> Row:
    """Mean, percentiles and coefficient of variation of the bytes per chunk of a stage."""
    sizes = np.concatenate([seg.chunk_lengths(stage) for seg in found])
    percentiles = {f"p{q}": float(np.percentile(sizes, q)) for q in PERCENTILES}
    return {"mean": float(sizes.mean()), **percentiles, "cv": float(sizes.std() / sizes.mean())}


def agreement(found: Sequence[Segmentation], kinds: Sequence[str]) -> dict[str, list[Row]]:
    """F1 with each kind of gold boundary per stage, beside controls with as many boundaries."""
    result: dict[str, list[Row]] = {}
    for kind in kinds if found else ():
        scores = [boundary_scores(found, kind, stage=s) for s in range(len(found[0].stages))]
        result[kind] = [
            {"f1": s.learned.f1, "random": s.random.f1, "stride": s.fixed_stride.f1} for s in scores
        ]
    return result


def decoding(settings: Compare, run: Config, model: HNetLM, texts: Sequence[bytes]) -> Row:
    """Generated bytes per second over all rows, share of samples that are valid UTF-8, and one
    sample. None for models that cannot generate text."""
    nothing = {"decode_bytes_per_sec": None, "valid_utf8": None, "sample": None}
    if run.data.tokenizer:
        return nothing
    prompts = [texts[i % len(texts)][:PROMPT_BYTES] for i in range(settings.samples)]
    prompts = [prompt.decode(errors="ignore").encode() for prompt in prompts]
    sampling = Sampling(max_bytes=settings.sample_bytes, eos=False)
    how = {"bos": run.data.bos_eos, "batch_size": settings.samples}
    try:
        generate(model, prompts, sampling, **how)  # compiles
    except ConfigError:  # it looks ahead, or is told its boundaries
        return nothing
    began = time.perf_counter()
    found = generate(model, prompts, sampling, **how)
    seconds = time.perf_counter() - began
    return {
        "decode_bytes_per_sec": sum(len(each.data) for each in found) / seconds,
        "valid_utf8": float(np.mean([is_utf8(p + each.data) for p, each in zip(prompts, found)])),
        "sample": (prompts[0] + found[0].data).decode(errors="replace"),
    }


def is_utf8(data: bytes) -> bool:
    """Whether the bytes are the beginning of valid UTF-8; the last character may be incomplete."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(data)
    except UnicodeDecodeError:
        return False
    return True
