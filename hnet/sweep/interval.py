"""Confidence interval of a mean over seeds."""

import math
import statistics
from collections.abc import Sequence


def interval(values: Sequence[float]) -> float:
    """Half-width of the 95% confidence interval of a mean (Student's t); 0 for one value."""
    from scipy.stats import t

    n = len(values)
    return float(t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n) if n > 1 else 0.0
