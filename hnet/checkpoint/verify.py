"""Read a checkpoint back and compare every bit with its manifest."""

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from rich.console import Console
from rich.progress import track

from hnet.checkpoint import leaves, manifest
from hnet.checkpoint.manifest import Damaged, Manifest
from hnet.checkpoint.step_folders import STATE, checkpoint_folder, list_steps
from hnet.errors import ConfigError, first_line
from hnet.printable import printable

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

_GROUP_BYTES = 1 << 28  # bytes of a checkpoint that the verify command reads at a time


def read_arrays(
    orbax: "ocp.Checkpointer",
    folder: epath.Path,
    record: Manifest,
    shardings: dict[str, jax.sharding.Sharding | None],
) -> dict[str, jax.Array | np.ndarray]:
    """Read the arrays of these paths with these shardings; compare bits with the manifest.

    A sharding of None gives a numpy array, read without a second copy in memory.
    Raises Damaged naming the first leaves that changed, and any error of Orbax.
    """
    wanted = {path: leaves.stored(record.leaves[path], s) for path, s in shardings.items()}
    tree = leaves.nest({path: leaf for path, leaf in wanted.items() if leaf.size})
    if tree:
        import orbax.checkpoint as ocp

        restore_args = jax.tree.map(_restore_args, tree)
        arguments = ocp.args.PyTreeRestore(tree, restore_args, partial_restore=True)
        tree = orbax.restore(folder / STATE, args=arguments)
    arrays, _ = leaves.flatten(tree)
    for path, leaf in wanted.items():
        if not leaf.size:
            zeros = jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
            arrays[path] = zeros if leaf.sharding else np.asarray(zeros)
    sums = leaves.checksums(arrays)
    bad = [path for path in arrays if sums[path] != record.leaves[path]["checksum"]]
    if bad:
        raise Damaged(
            f"{len(bad)} of {len(arrays)} arrays changed since the save ({leaves.few(bad)})"
        )
    return arrays


def _restore_args(leaf: jax.ShapeDtypeStruct) -> "ocp.RestoreArgs":
    import orbax.checkpoint as ocp

    if leaf.sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.checkpoint_utils.construct_restore_args(leaf)


def check_values(orbax: "ocp.Checkpointer", folder: epath.Path) -> Manifest:
    """Verify all arrays of a step, group by group; returns its manifest. Raises Damaged."""
    record = manifest.read(folder)
    manifest.check_files(folder, record)
    console = Console(stderr=True)
    parts = track(
        groups(record.leaves),
        f"step {record.step}",
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    for group in parts:
        try:
            read_arrays(orbax, folder, record, dict.fromkeys(group))
        except Damaged:
            raise
        except Exception as e:  # Orbax raises many types for damaged files
            raise Damaged(f"it cannot be read ({first_line(e)})") from None
    return record


def groups(leaf_of: dict[str, dict]) -> list[list[str]]:
    """The paths of a manifest's leaves in order, in groups of up to _GROUP_BYTES.

    A larger array is its own group."""
    found: list[list[str]] = []
    room = 0
    for path, leaf in leaf_of.items():
        size = math.prod(leaf["shape"]) * jnp.dtype(leaf["dtype"]).itemsize
        if size > room or not found:
            found.append([])
            room = _GROUP_BYTES
        found[-1].append(path)
        room -= size
    return found


def verify_workdir(workdir: str) -> int:
    """Print one line per checkpoint; returns 0 if a good one exists, else 1.

    Raises ConfigError if there are no checkpoints at all.
    """
    folder = checkpoint_folder(workdir)
    if not (steps := list_steps(folder)):
        raise ConfigError(f"workdir {workdir!r} has no checkpoints: {folder} holds no step folder")
    import orbax.checkpoint as ocp

    good = 0
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
        for step in steps:
            try:
                record = check_values(orbax, folder / str(step))
            except Damaged as e:
                print(f"step {step}: BAD: {printable(e)}", flush=True)
                continue
            good += 1
            size = f"{len(record.leaves)} arrays, {record.num_bytes / 1e6:.1f} MB"
            print(f"step {step}: good ({size}, saved {printable(record.saved_at)})", flush=True)
    return 0 if good else 1
