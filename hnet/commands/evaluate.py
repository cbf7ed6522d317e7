"""Bits per byte of a trained model, on its held-out text or on given files.

    python -m experiments.evaluate --checkpoint WORKDIR [--files GLOB ...] [--documents True]

Prints bits per byte in total, per file and, with --documents, per document, and the bytes per chunk
of each stage. Only source bytes count: no BOS, EOS or padding. --alphabet ACGTN adds the perplexity
per base of DNA.

    python -m experiments.evaluate --checkpoint WORKDIR --suite perturb counting [--files GLOB ...]

runs evaluations from papers (hnet/suites) instead. A model of tokens is scored by its tokens, which
is an upper bound; --exact True adds exact numbers.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Annotated, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from hnet import load
from hnet.bounds import Bounds, FilePath, Rows
from hnet.command_line import parse
from hnet.data import DataConfig, Part, eval_batches, open_corpus, open_part
from hnet.data.parallel import read_parallel
from hnet.decode.by_counts import Done, Fed, Static, forward
from hnet.decode.cache_memory import check_rows
from hnet.decode.score import logprobs
from hnet.decode.token_bytes import TokenBytes
from hnet.errors import ConfigError, shown
from hnet.files import json_text
from hnet.loss import bits_per_byte
from hnet.model import HNetLM
from hnet.printable import printable
from hnet.runtime.compile_cache import enable_compilation_cache
from hnet.suites import command
from hnet.suites.items import Settings
from hnet.train.evaluate import Evaluation, evaluate
from hnet.train.step import eval_metrics
from hnet.train.workdir import check_text, read_config, tokenizer_of
from hnet.weights.sources import Source, resolve


@dataclass(frozen=True)
class EvaluateConfig:
    """What to score and how to print the result."""

    checkpoint: FilePath
    """WORKDIR or WORKDIR@STEP of a run, an official checkpoint with its JSON, or hf://OWNER/NAME"""
    files: tuple[str, ...] = ()
    """globs of text to score, in quotes; empty = the held-out text of the run"""
    seq_len: Annotated[int, Bounds(0, 1 << 24)] = 0
    """positions per row, which limit the context of a byte; 0 = as trained"""
    batch_size: Rows = 8
    """number of rows scored together"""
    ema: bool = False
    """whether to take the moving average of the run's parameters (optim.ema_decay)"""
    bos: bool | None = None
    """whether to put BOS (byte 254) before each text; None = as in training"""
    documents: bool = False
    """also print one line per document"""
    alphabet: str = ""
    """bytes, such as ACGTN, whose perplexity is printed too: that of a base of DNA, without line
    ends and headers"""
    json: bool = False
    """print one JSON object instead of a table"""
    exact: bool = False
    """models of tokens: also exact bits per byte, which count all ways to spell a text, of up to
    `items` passages of `max_bytes` bytes, about one forward pass per byte"""
    suite: tuple[str, ...] = ()
    """evaluations to run instead: perturb, chars, markov, arithmetic, consistency, counting,
    diagnostic, stability, surprise, fairness"""
    items: Annotated[int, Bounds(1, 100_000)] = 200
    """suites, exact: number of questions per task, or of passages"""
    shots: Annotated[int, Bounds(0, 1000)] = 4
    """suites: number of solved examples before a question"""
    max_bytes: Annotated[int, Bounds(1, 2**31 - 1)] = 512
    """suites, exact: longest passage of a text"""
    seed: Annotated[int, Bounds(0, 2**32 - 1)] = 0
    """suites: seed of everything that is drawn"""
    parallel: tuple[str, ...] = ()
    """suite fairness: LANGUAGE=FILE, a sentence per line, line i saying the same in all"""


def main() -> None:
    config = parse(EvaluateConfig)
    enable_compilation_cache()
    if config.suite:
        return _suites(config)
    source = resolve(config.checkpoint)
    model = load(source.path, step=source.step, bos=config.bos, ema=config.ema)
    if config.exact and not model.tokenizer:
        raise ConfigError("exact=True: this model reads bytes, so its bits per byte are exact")
    data = replace(_data_config(config, source), bos_eos=model.bos)
    check_rows(data.batch_size, data.seq_len, model.config.vocab_size)
    part = _part(config, source)
    static, params = Static.of(model)

    def run_batch(batch, _):  # as many slots as the batch needs
        fed = Fed(
            *(batch.get(name) for name in ("input_ids", "segment_ids", "route_ids", "boundaries"))
        )
        return forward(static, params, fed, _metrics)

    batches = eval_batches(part, data, route_groups=model.config.route_groups)
    result = evaluate(
        batches, run_batch, (None,) * model.config.num_chunked,
        route_names=model.config.route_names,
    )  # fmt: skip
    report = summary(result, part)
    if config.alphabet:
        report |= perplexity(result, config.alphabet)
    if config.exact:
        report["exact"] = exact_bits(model, part, config)
    if config.json:
        print(json_text(report))
    else:
        _print(report, config.documents)


def _metrics(done: Done) -> dict[str, Any]:
    batch = {"input_ids": done.fed.input_ids_BL, "segment_ids": done.fed.segment_ids_BL}
    return eval_metrics(done.model, done.params, done.logits_BLV, done.boundaries, batch)


def _suites(config: EvaluateConfig) -> None:
    names = list(dict.fromkeys(config.suite))
    settings = Settings(config.items, config.shots, config.seed, config.max_bytes)
    command.check(names, settings)
    source = resolve(config.checkpoint)
    if source.is_run and read_config(source.path).data.tokenizer:
        raise ConfigError(f"checkpoint={config.checkpoint} reads tokens: suites ask for bytes")
    if needing := command.reads(names, "parallel"):
        if not config.parallel:
            raise ConfigError(
                f"suite {needing[0]}: give --parallel LANGUAGE=FILE for each language"
            )
        settings = replace(settings, parallel=read_parallel(config.parallel, field="parallel"))
    if command.reads(names, "texts"):
        settings = replace(settings, texts=command.passages(_part(config, source), settings))
    model = load(source.path, step=source.step, bos=config.bos, ema=config.ema)
    reports = command.run_suites(model, names, settings, batch_size=config.batch_size)
    if config.json:
        print(json_text({"checkpoint": config.checkpoint, "suites": reports}))
    else:
        command.print_reports(reports)


def _part(config: EvaluateConfig, source: Source) -> Part:
    """The text to score. Raises ConfigError if an input of the run has changed since training."""
    data = _data_config(config, source)
    corpus = None if config.files else open_corpus(data)
    if source.is_run:
        check_text(source.path, data, corpus, "give it the same content, or other text by --files")
    part = corpus.heldout if corpus else open_part(config.files, field="files")
    if not part.num_bytes:
        raise ConfigError(f"checkpoint={config.checkpoint} has no held-out text: give --files")
    return part


def _data_config(config: EvaluateConfig, source: Source) -> DataConfig:
    """The run's data settings, the defaults for an official checkpoint."""
    if source.is_run:
        data = read_config(source.path).data
        data = replace(data, tokenizer=tokenizer_of(source.path, data))
    elif config.files:
        data = DataConfig()
    else:
        raise ConfigError(f"checkpoint={config.checkpoint} is no work directory: give --files")
    seq_len = config.seq_len or data.seq_len
    return replace(data, seq_len=seq_len, batch_size=config.batch_size)


def summary(result: Evaluation, part: Part) -> dict[str, Any]:
    """Bits per byte in total, by file and by document, and each stage's bytes per chunk."""
    nats, num_bytes = result.nats_by_document, result.bytes_by_document
    names = {d: part.document_name(d) for d in sorted(nats)}
    files, documents = defaultdict(list), {}
    for document, name in names.items():
        files[part.file_of(document)].append(document)
        documents[f"{name} ({document})" if name in documents else name] = document

    def score(documents: Iterable[int]) -> dict[str, float]:
        count = sum(num_bytes[d] for d in documents)
        return {"bpb": bits_per_byte(math.fsum(nats[d] for d in documents), count), "bytes": count}

    return {
        **score(names),
        "unscored_bytes": part.num_bytes - result.num_bytes,
        "bytes_per_chunk": [result.bytes_per_chunk(s) for s in range(len(result.chunks_by_stage))],
        "positions_per_chunk": [
            result.positions_per_chunk(s) for s in range(len(result.chunks_by_stage))
        ],
        "files": {name: score(own) for name, own in files.items()},
        "documents": {name: score([document]) for name, document in documents.items()},
    }


def perplexity(result: Evaluation, alphabet: str) -> dict[str, Any]:
    """Perplexity per byte of the alphabet. Raises ConfigError if the text has none of them."""
    values = alphabet.encode()
    count = int(result.bytes_V[sorted(set(values))].sum())
    if not count:
        raise ConfigError(
            f"alphabet={shown(alphabet)}: no scored byte is one of them: name bytes of the text (a "
            "model of tokens has no perplexity per byte)"
        )
    return {"alphabet": alphabet, "alphabet_bytes": count, "perplexity": result.perplexity(values)}


def exact_bits(model: HNetLM, part: Part, config: EvaluateConfig) -> dict[str, Any]:
    """Bits per byte of passages, exact and of their tokens only."""
    exact = TokenBytes(model, batch_size=config.batch_size)
    texts = command.passages(part, Settings(config.items, max_bytes=config.max_bytes))
    size = sum(map(len, texts))
    nats = -sum(s.total() for s in logprobs(model, texts, batch_size=config.batch_size))
    tokens = -sum(map(exact.tokens_log_prob, texts))
    return {
        "passages": len(texts), "bytes": size, "bpb": bits_per_byte(nats, size),
        "bpb_of_tokens": bits_per_byte(tokens, size),
    }  # fmt: skip


def _print(report: dict[str, Any], with_documents: bool) -> None:
    table = Table("text", "bytes", "bits per byte", box=None)
    rows = [("all", report), *report["files"].items()]
    rows += report["documents"].items() if with_documents else []
    for name, score in rows:
        table.add_row(Text(printable(name)), f"{score['bytes']:,}", f"{score['bpb']:.4f}")
    console = Console(highlight=False)
    console.print(table)
    if "perplexity" in report:
        of = f"{report['alphabet_bytes']:,} bytes of {report['alphabet']}"
        console.print(escape(printable(f"perplexity {report['perplexity']:.4f} per byte, {of}")))
    if report["unscored_bytes"]:
        console.print(f"{report['unscored_bytes']:,} bytes that nothing predicts were not scored")
    if exact := report.get("exact"):
        console.print(
            f"{exact['passages']} passages, {exact['bytes']:,} bytes: {exact['bpb']:.4f} bits per "
            f"byte exactly, {exact['bpb_of_tokens']:.4f} by their tokens"
        )
    for s, size in enumerate(report["bytes_per_chunk"]):
        console.print(f"stage {s}: {size:.3f} bytes per chunk")
        for name, own in report["positions_per_chunk"][s].items():
            console.print(f"  route {escape(printable(name))}: {own:.3f} positions per chunk")
