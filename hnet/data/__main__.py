"""Make shards of text, or say what a run would read.

    python -m hnet.data prepare --files GLOB ... --out FOLDER
    python -m hnet.data describe --files GLOB ... [--eval_files GLOB ...]

`prepare` writes documents to ArrayRecord shards, which `--data.files 'FOLDER/*.array_record'`
reads; the same command again goes on where it stopped. `describe` takes the fields of the section
data of a run, and prints documents, bytes and what is held out. `COMMAND --help` lists the fields.
Exit codes: 0 done, 2 bad input, 130 interrupted.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hnet.bounds import Count, FilePath
from hnet.command_line import parse, run
from hnet.data import DataConfig, open_corpus
from hnet.data.prepare import prepare
from hnet.errors import ConfigError
from hnet.printable import printable


@dataclass(frozen=True)
class Prepare:
    """Write documents to ArrayRecord shards; the same command again goes on where it stopped."""

    files: tuple[str, ...]
    """quoted globs of .txt, .jsonl, .gz of both, or .parquet files"""
    out: FilePath
    """new folder; read it with --data.files 'OUT/*.array_record'"""
    shard_bytes: Count = 256 << 20
    """number of bytes of text per shard"""

    def run(self) -> None:
        manifest = prepare(self.files, self.out, self.shard_bytes)
        print(
            f"{manifest['documents']:,} documents, {manifest['bytes']:,} bytes in "
            f"{len(manifest['shards'])} shards of {self.out}"
        )


def describe(config: DataConfig) -> None:
    """Print documents and bytes of the training and held-out text of a configuration."""
    corpus = open_corpus(config)
    table = Table("source", "part", "documents", "bytes", "never predicted")
    for title, part in (("train", corpus.train), ("held out", corpus.heldout)):
        for documents in part.documents:
            unscored = 0 if config.bos_eos else len(documents)
            cells = (f"{n:,}" for n in (len(documents), documents.num_bytes, unscored))
            table.add_row(Text(printable(documents.name)), title, *cells)
    Console().print(table, Text(f"fingerprint {corpus.fingerprint}"))


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    # Both accept --files as well as --data.files.
    words = [w.replace("--data.", "--", 1) if w.startswith("--") else w for w in argv[1:]]
    match argv[:1]:
        case ["prepare"]:
            parse(Prepare, argv=words).run()
        case ["describe"]:
            describe(parse(DataConfig, argv=words))
        case ["--help" | "-h"]:
            print(__doc__.strip())
        case _:
            raise ConfigError(f"{' '.join(argv[:1])!r} is no command: use prepare or describe")


if __name__ == "__main__":
    run(main)
