"""Reads tests/golden: numbers of the official model (see tests/golden/README.md)."""

from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "golden"


def load(name: str) -> dict[str, np.ndarray]:
    """All arrays of one file by name. float32 arrays are stored as four byte planes."""
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        return {key: _from_planes(file[key]) for key in file.files}


def part(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays below `prefix/`, by the rest of their name."""
    prefix += "/"
    return {k.removeprefix(prefix): a for k, a in arrays.items() if k.startswith(prefix)}


def _from_planes(array: np.ndarray) -> np.ndarray:
    if array.dtype != np.uint8:
        return array
    return np.ascontiguousarray(np.moveaxis(array, 0, -1)).view("<f4")[..., 0]


def projections(gradient: np.ndarray, signs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The stored form of a gradient: the whole array if small, else signed sums over either axis.

    Every entry is in two of the sums, and their squared error estimates that of the gradient (the
    signs are random), so a wrong gradient is detected with 1/100 of the space.
    """
    gradient = np.asarray(gradient, np.float64)
    if gradient.size <= 256:
        return {"": gradient}
    matrix = gradient.reshape(gradient.shape[0], -1)
    rows, columns = (signs[str(n)].astype(np.float64) for n in matrix.shape)
    return {"/rows": matrix @ columns, "/columns": rows @ matrix}


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest difference over the largest reference value (0 / 0 counts as 0)."""
    difference = np.max(np.abs(np.asarray(ours, np.float64) - theirs))
    return float(difference / max(np.max(np.abs(theirs)), 1e-30))


def compare_gradients(grads: dict, found: dict, signs: dict, tolerance: float = 1e-4) -> set[str]:
    """Assert that gradients by parameters are those stored under `grad/param`; their names.

    Biases of keys have no gradient but rounding, in both.
    """
    stored = part(found, "grad/param")
    largest = max(np.abs(a).max() for a in stored.values())
    names = {name.removesuffix("/rows").removesuffix("/columns") for name in stored}
    for name in names:
        gradient = np.asarray(grads[name])
        is_sum = name in stored and stored[name].ndim < gradient.ndim  # as for some embeddings
        if is_sum:
            gradient = gradient.sum(axis=-1)
        is_whole = is_sum or not signs
        for tail, ours in ({"": gradient} if is_whole else projections(gradient, signs)).items():
            if name + tail not in stored:  # some networks have only one of the two sums
                continue
            theirs = stored[name + tail]
            if np.abs(theirs).max() < 1e-6 * largest:
                assert np.abs(ours).max() < 1e-6 * largest, name
                continue
            assert relative_error(ours, theirs) < tolerance, name + tail
    return names
