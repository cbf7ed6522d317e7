"""Fits bpb = a + b C^-c to the finished runs of a ladder, with bootstrap intervals."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hnet.errors import ConfigError

RESAMPLED = 400  # bootstrap fits
EXPONENTS = (0.05, 0.15, 0.4)  # values of c from which the search starts


@dataclass(frozen=True)
class Curve:
    """bpb at C training FLOPs is a + b (C / unit)^-c."""

    a: float
    b: float
    c: float
    unit: float
    """geometric mean of C over the points, so that b is the reducible part there"""
    intervals: dict[str, tuple[float, float]]
    """95% intervals of a, b and c; empty with fewer than five points: too few residuals"""

    def __call__(self, C: np.ndarray) -> np.ndarray:
        return _curve((self.a, self.b, self.c), np.asarray(C) / self.unit)


def _curve(numbers, x):
    a, b, c = numbers
    return a + b * x**-c


def fit(flops: np.ndarray, bpb: np.ndarray, *, seed: int = 0) -> Curve:
    """Least squares over a, b, c >= 0. The bootstrap resamples residuals, scaled up for the three
    fitted parameters, and refits. Raises ConfigError for fewer than three sizes."""
    flops, bpb = np.asarray(flops, float), np.asarray(bpb, float)
    if len(set(flops)) < 3:
        raise ConfigError(f"a curve of three numbers needs three sizes: {len(set(flops))} are done")
    unit = float(np.exp(np.log(flops).mean()))
    x = flops / unit
    numbers = min((_solve(x, bpb, c) for c in EXPONENTS), key=lambda found: found.cost).x
    intervals = {}
    if (free := len(x) - 3) > 1:
        fitted = _curve(numbers, x)
        residuals = (bpb - fitted) * (len(x) / free) ** 0.5
        rng = np.random.default_rng(seed)
        drawn = [
            _solve(x, fitted + rng.choice(residuals, len(x)), numbers[2]).x
            for _ in range(RESAMPLED)
        ]
        low, high = np.quantile(drawn, (0.025, 0.975), axis=0)
        intervals = {n: (float(lo), float(hi)) for n, lo, hi in zip("abc", low, high)}
    return Curve(*map(float, numbers), unit, intervals)


def _solve(x: np.ndarray, y: np.ndarray, c: float):
    from scipy.optimize import least_squares

    start = (max(0.9 * y.min(), 1e-6), max(np.ptp(y), 1e-3), max(c, 1e-3))
    return least_squares(
        lambda numbers: _curve(numbers, x) - y, start, bounds=(0, np.inf), x_scale=(1, 1, 0.1),
        xtol=1e-12, ftol=1e-12,
    )  # fmt: skip


def draw(points: dict[str, list[dict[str, Any]]], curves: dict[str, Curve], path: Path) -> bool:
    """Plot bpb over training FLOPs, one colour per family; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for n, (family, rows) in enumerate(points.items()):
        C = np.array([row["train_flops"] for row in rows])
        axes.plot(C, [row["bpb"] for row in rows], "o", color=f"C{n}", label=family)
        if family in curves:
            smooth = np.geomspace(C.min(), C.max() * 4, 100)
            axes.plot(smooth, curves[family](smooth), color=f"C{n}", lw=1)
    axes.set(xscale="log", xlabel="training FLOPs", ylabel="held-out bits per byte")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True
