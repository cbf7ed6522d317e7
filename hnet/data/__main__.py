"""``python -m hnet.data prepare`` makes shards, ``... describe`` says what a run would read."""

import contextlib
import io
import sys
from dataclasses import dataclass

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hnet.data import DataConfig, open_corpus
from hnet.data.prepare import prepare
from hnet.errors import ConfigError


@dataclass(frozen=True)
class Prepare:
    """Write documents to ArrayRecord shards; the same command again goes on where it stopped."""

    files: tuple[str, ...]
    """quoted globs of .txt, .jsonl, .gz of both, or .parquet files"""
    out: str
    """a new folder; read it with --data.files 'OUT/*.array_record'"""
    shard_bytes: int = 256 << 20
    """bytes of text in a shard"""

    def run(self) -> None:
        manifest = prepare(self.files, self.out, self.shard_bytes)
        print(
            f"{manifest['documents']:,} documents, {manifest['bytes']:,} bytes in "
            f"{len(manifest['shards'])} shards of {self.out}"
        )


@dataclass(frozen=True)
class Describe:
    """Print the documents, bytes and division of the text that the settings name."""

    data: DataConfig = DataConfig()

    def run(self) -> None:
        corpus = open_corpus(self.data)
        table = Table("source", "part", "documents", "bytes", "never predicted")
        for title, part in (("train", corpus.train), ("held out", corpus.heldout)):
            for documents in part.documents:
                unscored = 0 if self.data.bos_eos else len(documents)
                cells = (f"{n:,}" for n in (len(documents), documents.num_bytes, unscored))
                table.add_row(Text(repr(documents.name)[1:-1]), title, *cells)
        Console().print(table, Text(f"fingerprint {corpus.fingerprint}"))


def main(args: list[str] | None = None) -> int:
    """Run the command line; the exit code is 2 for bad input, 130 when stopped by the user."""
    try:
        _parse(args).run()
    except ConfigError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


def _parse(args: list[str] | None) -> Prepare | Describe:
    """Read the command line. Raises ConfigError for a value that a configuration refuses."""
    commands = {"prepare": Prepare, "describe": Describe}
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.extras.subcommand_cli_from_dict(
                commands,
                prog="python -m hnet.data",
                args=args,
                config=(tyro.conf.FlagConversionOff,),
            )
    except SystemExit as exit_:
        cause = exit_.__context__
        while cause is not None and not isinstance(cause, ConfigError):
            cause = cause.__context__
        if cause is not None:  # tyro draws a box around it: give the line alone
            raise cause from None
        sys.stderr.write(box.getvalue())
        raise


if __name__ == "__main__":
    sys.exit(main())
