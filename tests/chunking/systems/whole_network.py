"""Whole networks against other codes: logits, loss and the gradients of all parameters.

Everything but the blocks inside stacks is ours: embeddings, predictors, pools, main networks,
dechunks, heads. Blocks of LLaMA are our layers T (BLT, AU-Net); `tests.reference_blocks` has the
others. Gradients are by the reference's parameters, from which ours are made.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hnet.model import HNetLM
from tests.golden_data import compare_gradients, part, relative_error
from tests.networks import quick_jit
from tests.reference_blocks import placed

VALUE = 2e-5


class Case(NamedTuple):
    model: HNetLM
    params: Callable[[dict], dict]
    """values in our tree, by path, from the reference's parameters"""
    targets_BL: np.ndarray
    options: dict
    """inputs of the network besides the bytes"""
    stored: Callable[[jax.Array], jax.Array]
    """logits that are stored, of those of all positions (B, L, V)"""
    counted_L: np.ndarray | None = None
    """positions whose cross-entropy counts, bool; None: all"""


def agrees(case: Case, found: dict, weights: dict) -> set[str]:
    """Assert that all stored results are ours; the parameters whose gradients were compared."""
    ids_BL = found["in/tokens_BL"]
    graph, state = nnx.split(case.model)
    tree = nnx.to_pure_dict(state)

    @quick_jit
    def run(weights, ids_BL):
        def scalar(weights):
            model = nnx.merge(graph, placed(tree, case.params(weights)))
            logits_BLV, records = model(ids_BL, **case.options)
            nll_BLV = -jax.nn.log_softmax(logits_BLV)
            picked_BL = jnp.take_along_axis(nll_BLV, case.targets_BL[..., None], -1)[..., 0]
            counted_L = slice(None) if case.counted_L is None else case.counted_L
            return jnp.mean(picked_BL[:, counted_L]), (case.stored(logits_BLV), records)

        return jax.value_and_grad(scalar, has_aux=True)(weights)

    (loss, (logits, records)), grads = jax.device_get(run(weights, ids_BL))
    (at,) = (key for key in found if key.startswith("out/logits_B"))
    assert relative_error(logits, found[at]) < VALUE
    assert relative_error(loss, found["out/loss"]) < VALUE
    if "out/pool_mask0_BL" in found:  # of the other stage they are by bytes there
        inner_BL = found["out/pool_mask1_BL"]
        assert np.array_equal(records[0].boundary_mask_BL, found["out/pool_mask0_BL"])
        assert np.array_equal(records[1].boundary_mask_BL.sum(1), inner_BL.sum(1))
    if "out/changed_L" in found:  # logits that move when one byte is changed
        changed_BL = ids_BL.copy()
        changed_BL[:, found["in/perturbed_position"]] ^= 1
        moved_BLV = run(weights, changed_BL)[0][1][0] != logits
        assert np.array_equal(np.any(moved_BLV, axis=(0, 2)), found["out/changed_L"])
    return compare_gradients(grads, found, part(found, "signs"))
