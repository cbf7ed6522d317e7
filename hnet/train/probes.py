"""Texts whose boundaries are drawn at every evaluation: held-out text and known trouble."""

import random

from hnet.data import Part
from hnet.inspect.gold import annotate
from hnet.inspect.segmentation import Segmentation

_SCRIPTS = (
    "Latin: the reader cuts where words end; Größe, naïve, 3.14\n"
    "Кириллица: слова режутся иначе\nΕλληνικά: λέξεις\nעברית: מילים\nالعربية: كلمات\n"
    "हिन्दी: शब्द\nไทย: คำ\n日本語: かなと漢字とカタカナ\n한국어: 낱말\n😀👩‍👩‍👧 e\u0301"
)
_CODE = "def mean(values):\n    total = sum(values)\n    return total / len(values)\n"


def probe_texts(heldout: Part, num_bytes: int) -> list[Segmentation]:
    """Held-out text first, then code, many scripts, a repeated byte, random bytes and DNA."""
    random_bytes, bases = random.Random(0), random.Random(1)
    texts = [("heldout", next(heldout.texts(), b"")[:num_bytes])] if heldout.num_documents else []
    texts += [
        ("code", _CODE.encode()),
        ("scripts", _SCRIPTS.encode()),
        ("repeated byte", b"T" * 64),
        ("random bytes", random_bytes.randbytes(64)),
        ("dna", bytes(bases.choices(b"ACGT", k=64))),
    ]
    return [annotate(Segmentation(text, name), "words", "characters") for name, text in texts]
