"""Raw bytes in, packed batches out; knows nothing of models."""

from hnet.data.config import DataConfig
from hnet.data.corpus import Corpus, Part, open_corpus, open_part
from hnet.data.pipeline import BatchIterator, batch_fingerprint, eval_batches, train_batches

__all__ = [
    "BatchIterator",
    "Corpus",
    "DataConfig",
    "Part",
    "batch_fingerprint",
    "eval_batches",
    "open_corpus",
    "open_part",
    "train_batches",
]
