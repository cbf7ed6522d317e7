"""``python -m hnet.data prepare`` makes shards, ``... describe`` says what a run would read."""

import sys

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hnet.config import ConfigError
from hnet.data import DataConfig, open_corpus
from hnet.data.prepare import prepare


def _prepare(files: tuple[str, ...], out: str, shard_bytes: int = 256 << 20) -> None:
    """Write documents to ArrayRecord shards; the same command again goes on where it stopped.

    Args:
        files: quoted globs of .txt, .jsonl, .gz of both, or .parquet files
        out: a new folder; read it with --data.files 'OUT/*.array_record'
        shard_bytes: bytes of text in a shard
    """
    manifest = prepare(files, out, shard_bytes)
    print(
        f"{manifest['documents']:,} documents, {manifest['bytes']:,} bytes in "
        f"{len(manifest['shards'])} shards of {out}"
    )


def _describe(data: DataConfig = DataConfig()) -> None:  # noqa: B008 (frozen)
    """Print the documents, bytes and division of the text that these settings name."""
    corpus = open_corpus(data)
    table = Table("source", "part", "documents", "bytes", "never predicted")
    for title, part in (("train", corpus.train), ("held out", corpus.heldout)):
        for documents in part.documents:
            unscored = 0 if data.bos_eos else len(documents)
            cells = (f"{n:,}" for n in (len(documents), documents.num_bytes, unscored))
            table.add_row(Text(repr(documents.name)[1:-1]), title, *cells)
    Console().print(table, Text(f"fingerprint {corpus.fingerprint}"))


def main(args: list[str] | None = None) -> int:
    """Run the command line; the exit code is 2 for bad input, 130 when stopped by the user."""
    subcommands = {"prepare": _prepare, "describe": _describe}
    try:
        tyro.extras.subcommand_cli_from_dict(subcommands, prog="python -m hnet.data", args=args)
    except ConfigError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
