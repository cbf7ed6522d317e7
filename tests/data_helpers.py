"""Small corpora for the tests of hnet.data."""

import json

import numpy as np

from hnet.data.documents import Documents
from hnet.data.sources import Source


class MemoryStore:
    """Bytes held in memory."""

    def __init__(self, data):
        self.data = np.frombuffer(bytes(data), np.uint8)

    def read(self, start, stop):
        return self.data[start:stop]


def jsonl(texts):
    return b"".join(json.dumps({"text": t}).encode() + b"\n" for t in texts)


def make_documents(texts, gap=3):
    """Documents in a store, with unrelated bytes between them."""
    data, starts = bytearray(), []
    for text in texts:
        data += b"#" * gap
        starts.append(len(data))
        data += text
    lengths = np.array([len(t) for t in texts], np.int64)
    numbers = np.arange(len(texts))
    store = MemoryStore(data)
    source = Source("*.txt", store, lengths, ("f",), np.zeros(1, np.int64), b"")
    zeros = np.zeros(len(texts), np.int32)
    return Documents("*.txt", (source,), zeros, numbers, np.array(starts, np.int64), lengths)
