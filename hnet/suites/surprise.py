"""Boundary enrichment (arXiv 2601.22805): whether boundaries lie before surprising bytes.

bq is the mean surprisal of the byte after a boundary divided by that of all bytes. null is the same
for boundaries shifted along each text by a random amount, z the difference in standard deviations.
"""

import math
from dataclasses import asdict

import numpy as np

from hnet.errors import ConfigError
from hnet.inspect.metrics import boundary_enrichment
from hnet.suites.items import Report, Settings
from hnet.suites.scorer import Scorer


def run(scorer: Scorer, settings: Settings) -> Report:
    if not scorer.alignments:
        raise ConfigError("suite surprise: the model cuts nowhere, it has one stage")
    found = scorer.boundaries(settings.texts)
    surprisal = [-score.logprobs for score in scorer.score(settings.texts)]
    rows = []
    for stage, alignment in enumerate(scorer.alignments):
        masks = [np.zeros(len(seg.data), bool) for seg in found]
        for mask, seg in zip(masks, found):  # at the byte that decides: an end is one byte earlier
            mask[seg.boundaries(stage) - (alignment == "end")] = True
        enrichment = asdict(boundary_enrichment(zip(masks, surprisal), seed=settings.seed))
        finite = {k: v if math.isfinite(v) else None for k, v in enrichment.items()}
        rows.append({"stage": stage, **finite})
    return {"surprise": rows}
