"""Raw bytes in, packed batches out; knows nothing of models."""

from hnet.data.config import DataConfig
from hnet.data.corpus import Corpus, Part, open_corpus, open_part
from hnet.data.fingerprint import batch_fingerprint, batch_hash, fingerprint
from hnet.data.pipeline import BatchIterator, eval_batches, train_batches

__all__ = [
    "BatchIterator",
    "Corpus",
    "DataConfig",
    "Part",
    "batch_fingerprint",
    "batch_hash",
    "eval_batches",
    "fingerprint",
    "open_corpus",
    "open_part",
    "train_batches",
]
