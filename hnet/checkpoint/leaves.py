"""A tree of arrays as named leaves: paths, schema, checksums of the bits.

Orbax restores an array with a flipped bit without an error. Therefore each leaf has a checksum,
which is computed where the array lies before the save and compared after the restore.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hnet.errors import ConfigError


def flatten(tree: Any, prefix: str = "") -> tuple[dict[str, Any], Any]:
    """``({"params/encoder/w": leaf, ...}, treedef)``; the paths name leaves in a checkpoint.

    Typed random keys stay typed here; ``raw`` gives the array that is stored.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat]
    named = {"/".join(filter(None, (prefix, n))): leaf for n, (_, leaf) in zip(names, flat)}
    if len(named) != len(flat):
        raise ValueError("two leaves of the state have the same path: keys may not contain '/'")
    return named, treedef


def nest(named: dict[str, Any]) -> dict[str, Any]:
    """``{"a/b": x}`` -> ``{"a": {"b": x}}``."""
    tree: dict[str, Any] = {}
    for path, leaf in named.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def is_key(leaf: Any) -> bool:
    """Whether a leaf (or its ShapeDtypeStruct) is a typed random key."""
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def raw(leaf: Any) -> jax.Array:
    """The array that is stored for a leaf; for a random key its uint32 data."""
    leaf = leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def describe(named: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Path -> shape and dtype of the stored array (see ``raw``), as in the manifest."""
    arrays = {p: jax.eval_shape(raw, x) if is_key(x) else x for p, x in named.items()}
    return {p: {"shape": list(x.shape), "dtype": str(x.dtype)} for p, x in arrays.items()}


def stored(leaf: dict[str, Any], sharding: jax.sharding.Sharding | None) -> jax.ShapeDtypeStruct:
    """A leaf of the schema as a ``jax.ShapeDtypeStruct``."""
    return jax.ShapeDtypeStruct(tuple(leaf["shape"]), jnp.dtype(leaf["dtype"]), sharding=sharding)


def as_wanted(array: jax.Array, leaf: Any) -> jax.Array:
    """The stored array converted to the type of ``leaf``: a typed random key, or its dtype."""
    if is_key(leaf):
        impl: list[str] = []
        jax.eval_shape(lambda key: impl.append(jax.random.key_impl(key)), leaf)
        return jax.random.wrap_key_data(array, impl=impl[0])
    return array if array.dtype == leaf.dtype else array.astype(leaf.dtype)


def check_schema(
    where: str, saved: dict[str, dict], wanted: dict[str, dict], *, cast_dtype: bool = False
) -> None:
    """Compare two schemas (``describe``). Raises ConfigError with the differences in one line."""
    if "step" in wanted and all(path.startswith("params/") for path in saved):
        raise ConfigError(
            f"checkpoint {where} holds parameters, but no run that can go on: start one from them "
            f"in another workdir: --init.from {where} --workdir NEW"
        )
    both = [path for path in wanted if path in saved]

    def changed(key: str) -> list[str]:
        pairs = [(p, saved[p][key], wanted[p][key]) for p in both]
        return [f"{p}: {old} saved, {new} wanted" for p, old, new in pairs if old != new]

    differences = {
        "missing in it": [path for path in wanted if path not in saved],
        "only in it": [path for path in saved if path not in wanted],
        "of another shape": changed("shape"),
    }
    if any(differences.values()):
        raise ConfigError(
            f"checkpoint {where} is of another architecture: "
            + "; ".join(f"{len(d)} {kind} ({few(d)})" for kind, d in differences.items() if d)
            + ": use the configuration in its manifest.json, or another workdir"
        )
    if not cast_dtype and (dtypes := changed("dtype")):
        raise ConfigError(
            f"checkpoint {where} has other dtypes ({few(dtypes)}): restore into the saved ones, "
            "or set checkpoint.cast_dtype True"
        )


def few(items: list[str]) -> str:
    """The first three items of a list, joined by commas."""
    return ", ".join(items[:3]) + (", ..." if len(items) > 3 else "")


def checksums(arrays: dict[str, jax.Array | np.ndarray]) -> dict[str, str]:
    """64-bit checksum (hex) of each array's bits and their positions.

    Two sums modulo 2**32 over the words of ``_mixed``. Integer sums do not depend on their order,
    so any sharding on any devices gives the same result. Computed where the array lies.
    """
    sums = {p: (_host_sums if _on_host(x) else _device_sums)(x) for p, x in arrays.items()}
    return {path: f"{int(a):08x}{int(b):08x}" for path, (a, b) in jax.device_get(sums).items()}


def _on_host(x: jax.Array | np.ndarray) -> bool:
    """Whether x is a numpy array, or so small a CPU array that numpy beats compiling its shape."""
    if isinstance(x, np.ndarray):
        return True
    here = x.is_fully_addressable and all(d.platform == "cpu" for d in x.sharding.device_set)
    return here and x.size <= 1 << 20


def _mixed(words: Any, index: Any) -> tuple[Any, Any]:
    """Two hashes of each uint32 word at its uint32 index (finalizer of MurmurHash3).

    Each hash is a bijection of the word, so one changed word always changes both sums. The index
    enters the hash, so that a swap of two words changes the sums.
    """
    first = _mix(words + index * np.uint32(0x9E3779B1))
    return first, _mix(_mix(words ^ np.uint32(0x5BD1E995)) ^ index)


def _mix(x: Any) -> Any:
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


@jax.jit
def _device_sums(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    width = min(x.dtype.itemsize, 4)  # wider elements become several words on a new last axis
    words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * width}")).astype(jnp.uint32)
    index = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        stride = np.uint32(math.prod(words.shape[axis + 1 :]) & 0xFFFFFFFF)
        index += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * stride
    zero, axes = np.uint32(0), tuple(range(words.ndim))
    # One reduction for both sums: for two, XLA:CPU would store their operands in memory first.
    return jax.lax.reduce(_mixed(words, index), (zero, zero), _add_pairs, axes)


def _add_pairs(a: tuple, b: tuple) -> tuple:
    return a[0] + b[0], a[1] + b[1]


_PIECE = 1 << 16  # words that numpy hashes at a time, to stay in cache


def _host_sums(x: jax.Array | np.ndarray) -> tuple[int, int]:
    flat = np.ascontiguousarray(x).reshape(-1)
    words = flat.view(f"<u{min(flat.dtype.itemsize, 4)}")
    sums = np.zeros(2, np.uint64)
    for start in range(0, words.size, _PIECE):
        piece = words[start : start + _PIECE].astype(np.uint32)
        index = np.arange(start, start + piece.size).astype(np.uint32)
        sums += [h.sum(dtype=np.uint64) for h in _mixed(piece, index)]
    return tuple(int(total) & 0xFFFFFFFF for total in sums)
