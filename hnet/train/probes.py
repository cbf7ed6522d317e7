"""Texts whose boundaries are drawn at every evaluation: held-out text and difficult cases."""

import random
from dataclasses import replace
from pathlib import Path

from hnet.data import Part
from hnet.inspect.gold import annotate, clip, read_annotated, thin
from hnet.inspect.segmentation import Segmentation
from hnet.train.config import EvalConfig

_SCRIPTS = (
    "Latin: the reader cuts where words end; Größe, naïve, 3.14\n"
    "Кириллица: слова режутся иначе\nΕλληνικά: λέξεις\nעברית: מילים\nالعربية: كلمات\n"
    "हिन्दी: शब्द\nไทย: คำ\n日本語: かなと漢字とカタカナ\n한국어: 낱말\n😀👩‍👩‍👧 e\u0301"
)
_CODE = "def mean(values):\n    total = sum(values)\n    return total / len(values)\n"


def probe_texts(heldout: Part, config: EvalConfig) -> list[Segmentation]:
    """Held-out text, annotated texts, code, many scripts, a repeated byte, random bytes, DNA.

    Raises ConfigError for annotated files that cannot be read.
    """
    random_bytes, bases = random.Random(0), random.Random(1)
    texts = [
        clip(
            Segmentation(
                heldout.begin(d, config.probe_bytes + 4), Path(heldout.document_name(d)).name
            ),
            config.probe_bytes,
        )
        for d in thin(range(heldout.num_documents), config.probe_texts)
    ]
    for path in config.probe_files:
        chosen = thin(list(read_annotated(path)), config.probe_texts)
        texts += [replace(clip(text, config.probe_bytes), stages=()) for text in chosen]
    texts += [
        Segmentation(text, name)
        for name, text in (
            ("code", _CODE.encode()),
            ("scripts", _SCRIPTS.encode()),
            ("repeated byte", b"T" * 64),
            ("random bytes", random_bytes.randbytes(64)),
            ("dna", bytes(bases.choices(b"ACGT", k=64))),
        )
    ]
    return [annotate(text, "words", "characters") for text in texts]
