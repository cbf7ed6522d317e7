"""Tokenizers learned from text: BPE, unigram, SuperBPE, LiB, Equal-Info Windows.

`data.tokenizer` is the file of one, or its kind and number of tokens, such as "bpe:2048": then the
training text of a run is what it is learned from.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from hnet.data.tokenizers.bpe import learned, train_bpe
from hnet.data.tokenizers.equal_info import train_equal_info
from hnet.data.tokenizers.lib import train_lib
from hnet.data.tokenizers.superbpe import train_superbpe
from hnet.errors import ConfigError

SAMPLE_BYTES = 1 << 20
"""number of bytes at the beginning of a text from which a tokenizer is learned"""


def train_unigram(texts: Sequence[bytes], vocab_size: int):
    """Unigram language model over bytes, with the pre-tokenization of GPT-2."""
    import tokenizers as lib

    return learned(lib.models.Unigram(), lib.trainers.UnigramTrainer, texts, vocab_size)


TOKENIZERS: dict[str, Callable[[Sequence[bytes], int], str]] = {
    "bpe": lambda texts, size: train_bpe(texts, size).to_str(),
    "unigram": lambda texts, size: train_unigram(texts, size).to_str(),
    "superbpe": lambda texts, size: train_superbpe(texts, size).to_str(),
    "lib": train_lib,
    "equal_info": train_equal_info,
}
"""Content of the file of a tokenizer by kind: function of (texts, number of tokens)."""


class Wanted(NamedTuple):
    """A tokenizer that is yet to be learned."""

    kind: str
    size: int
    """number of tokens, the 256 bytes included"""

    def train(self, texts: Sequence[bytes]) -> str:
        """Content of the file. Raises ConfigError without the library, or for texts that it cannot
        read."""
        try:
            return TOKENIZERS[self.kind](texts, self.size)
        except ImportError:
            raise ConfigError(
                f"data.tokenizer='{self.kind}:{self.size}': the library tokenizers is not "
                "installed: pip install 'hnet-jax[bpe]'"
            ) from None
        except UnicodeDecodeError as e:
            raise ConfigError(
                f"data.tokenizer='{self.kind}:{self.size}': a text is not UTF-8 ({e}): use lib, or "
                "other text"
            ) from None


def wanted(tokenizer: str) -> Wanted | None:
    """The tokenizer to be learned for a value of `data.tokenizer`; None for a file.

    Raises ConfigError for a size that cannot hold every byte.
    """
    kind, colon, size = tokenizer.partition(":")
    if not colon or kind not in TOKENIZERS or Path(tokenizer).exists():
        return None
    if not (size.isascii() and size.isdigit() and 257 <= int(size) <= 1 << 20):
        raise ConfigError(
            f"data.tokenizer={tokenizer!r}: use 257 to {1 << 20} tokens, such as '{kind}:2048'"
        )
    return Wanted(kind, int(size))
