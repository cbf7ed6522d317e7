"""The table of embeddings by name. A new embedding needs one file and one line here."""

from hnet.parts import Table

EMBEDDINGS = Table(
    "embedding",
    {
        "bytes": "hnet.nn.embeddings.bytes:Bytes",
        "hash_ngrams": "hnet.nn.embeddings.hash_ngrams:HashNgrams",
        "lexinvariant": "hnet.nn.embeddings.lexinvariant:Lexinvariant",
        "glyphs": "hnet.nn.embeddings.glyphs:Glyphs",
    },
)
