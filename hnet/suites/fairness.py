"""Chunks per parallel sentence: how equal they are over languages (arXiv 2407.08818).

cv is the standard deviation over the mean, gini the mean absolute difference of all pairs over
twice the mean, both over languages. `experiments.fairness` compares several systems in more detail.
"""

import math
from dataclasses import asdict

import numpy as np

from hnet.errors import ConfigError
from hnet.inspect.fairness import chunk_spread, score_language
from hnet.suites.items import Report, Settings
from hnet.suites.scorer import Scorer


def run(scorer: Scorer, settings: Settings) -> Report:
    if not scorer.alignments:
        raise ConfigError("suite fairness: the model cuts nowhere, it has one stage")
    languages = {}
    for name, sentences in settings.parallel.items():
        scores = scorer.score(sentences)
        languages[name] = score_language(
            scorer.boundaries(sentences),
            nats=-math.fsum(float(np.nansum(s.logprobs, dtype=np.float64)) for s in scores),
            scored_bytes=sum(int(np.isfinite(s.logprobs).sum()) for s in scores),
        )
    stages = range(len(scorer.alignments))
    return {
        "fairness": [
            {"stage": s, **asdict(chunk_spread(list(languages.values()), s))} for s in stages
        ],
        "fairness by language": [
            {
                "language": name,
                "sentences": found.sentences,
                "bytes_per_sentence": found.bytes_per_sentence,
                "bpb": found.bpb,
                **{f"chunks_per_sentence_{s}": found.chunks_per_sentence[s] for s in stages},
            }
            for name, found in languages.items()
        ],
    }
