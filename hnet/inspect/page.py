"""Segmentations as one self-contained HTML page: the view of the TensorBoard tab as a file."""

import base64
import hashlib
import html
from collections.abc import Mapping, Sequence

from hnet.files import json_text
from hnet.inspect.plugin import assets
from hnet.inspect.segmentation import Segmentation
from hnet.inspect.store import text_facts, text_key
from hnet.printable import printable

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<script type="application/json" id="segmentations">{data}</script>
<script type="module">{script}</script>
</body>
</html>
"""


def to_html(
    segmentations: Sequence[Segmentation] | Mapping[str, Sequence[Segmentation]],
    *,
    title: str = "Chunk boundaries",
    step: int | None = None,
) -> str:
    """One HTML page without external references that shows the texts like the plugin.

    segmentations: texts of one model, or model name -> texts, to compare several models. step:
    training step of the segmentations, if known. The data are JSON that cannot start markup, and
    are shown only as text.
    """
    runs = segmentations if isinstance(segmentations, Mapping) else {"model": segmentations}
    data = {name: _run(texts, step) for name, texts in runs.items()}
    script = assets.script() + "render();\n"
    return _PAGE.format(
        title=html.escape(printable(title)),
        style=assets.style(),
        data=json_text(data, separators=(",", ":")).replace("<", "\\u003c"),
        script=script,
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
    )


def _run(segmentations: Sequence[Segmentation], step: int | None) -> dict:
    keyed = {text_key(seg): seg for seg in segmentations}
    return {
        "step": step,
        "texts": {key: text_facts(seg) for key, seg in keyed.items()},
        "views": {key: seg.to_json() for key, seg in keyed.items()},
    }
