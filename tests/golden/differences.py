"""Print a table: largest difference from every file of other codes' numbers, as the tests see it.

    python tests/golden/differences.py [further options of pytest]

It runs the tests that read tests/golden/family and records each comparison with a stored array.
Differences are relative to the largest stored value; "exact" means equal. An array that is computed
from stored ones keeps the name of the first.
"""

import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
FILES = (
    "chunking/systems", "chunking/test_blt.py", "chunking/test_words.py",
    "chunking/test_cross_attention.py", "chunking/test_deletion.py", "nn/test_mlstm.py",
)  # fmt: skip
worst: dict[tuple[str, str], float] = defaultdict(lambda: -1.0)


class Stored(np.ndarray):
    """An array that knows its file and name, and so do arrays made of it."""

    def __array_finalize__(self, source):
        self.name = getattr(source, "name", None)


class File(dict):
    """The arrays of a file, as `np.load` gives them."""

    @property
    def files(self) -> list[str]:
        return list(self)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def named(array: np.ndarray, name: tuple[str, str] | None) -> np.ndarray:
    array = array.view(Stored)
    array.name = name
    return array


def quantity(key: str) -> str:
    """Group of an array: values of a network, all gradients, or the name itself."""
    kinds = ("intergrad", "grad_param", "grad", "inter", "param")
    found = next((kind for kind in kinds if f"/{kind}" in f"/{key}"), None)
    case = key.split("/")[0]
    case = "" if found and case.startswith(found) else case
    return " ".join(filter(None, (case, {"grad_param": "grad"}.get(found, found)))) or key


def note(array, error: float, quantity: Callable[[str], str] = str) -> None:
    name = getattr(array, "name", None)
    if name is not None:
        at = name[0], quantity(name[1])
        worst[at] = max(worst[at], error)


def main(options: list[str]) -> int:
    from tests import golden_data

    relative_error, equal = golden_data.relative_error, np.array_equal
    load, contiguous = np.load, np.ascontiguousarray

    def recorded_load(path, **more):
        found = load(path, **more)
        if Path(path).parent.name != "family":
            return found
        return File({key: named(found[key], (Path(path).stem, key)) for key in found.files})

    def recorded_contiguous(array, *more):
        return named(contiguous(array, *more), getattr(array, "name", None))

    def recorded_error(ours, theirs):
        error = relative_error(np.asarray(ours), np.asarray(theirs))
        note(theirs, error, quantity)
        return error

    def recorded_equal(ours, theirs, **more):
        same = equal(ours, theirs, **more)
        for array in (ours, theirs):
            note(array, 0.0 if same else np.inf)
        return same

    golden_data.relative_error, np.array_equal = recorded_error, recorded_equal
    np.load, np.ascontiguousarray = recorded_load, recorded_contiguous
    tests = [str(ROOT / f"tests/{name}") for name in FILES]
    code = pytest.main(["-q", "-n", "0", "--no-header", *tests, *options])
    print("\n| file | quantity | largest difference |\n| --- | --- | --- |")
    for (file, name), error in sorted(worst.items()):
        print(f"| {file} | {name} | {'exact' if error == 0 else f'{error:.1e}'} |")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
