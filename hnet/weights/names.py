"""Names in a folder, on a disk or on the Hub, of a file of weights and of its JSON."""

from pathlib import Path

from hnet.errors import ConfigError
from hnet.weights.tensors import is_tensor_file


def weights_among(names: list[str], where: str) -> str:
    """The file of weights of a folder. Raises ConfigError if that is not clear."""
    found = [n for n in names if "/" not in n and is_tensor_file(n)]
    if "model.safetensors" in found:
        return "model.safetensors"
    if len(found) != 1:
        raise ConfigError(
            f"checkpoint={where!r} has {len(found)} files of weights "
            f"({', '.join(sorted(found)[:4]) or 'none'}): name one, or call it model.safetensors"
        )
    return found[0]


def json_names(weights: str) -> list[str]:
    """Names of the JSON that may belong to a file of weights, best first."""
    stem = Path(weights).stem
    return [f"{stem}.json", f"{stem.removesuffix('_params')}_config.json", "config.json"]
