"""Pieces of chunking systems against the numbers of their own code (tests/golden/family).

Tolerances (tests/golden/README.md): values 2e-5, gradients 1e-4 of an array's largest value, masks
exact. Networks of MAGNET, FlexiTokens and SpaceByte are compared at the stage that chunks: encoder
states and gradients that come from the decoder and the main network are given. States are stored
time first (L, B, D).
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hnet.chunking.config import ChunkingConfig
from hnet.chunking.part import LossInputs
from hnet.chunking.rates import rate_counts
from hnet.config import HNetConfig, StageConfig
from hnet.model import abstract
from hnet.nn.context import Context
from hnet.train.named import base_config
from tests.golden_data import relative_error
from tests.networks import drawn, quick_jit

VALUE, GRADIENT = 2e-5, 1e-4


def batch_first(array):
    return np.ascontiguousarray(np.moveaxis(array, 0, 1))


def agree(ours, theirs, tolerance=VALUE):
    assert relative_error(ours, theirs) < tolerance


def gradients_agree(ours, theirs):
    agree(ours, theirs, GRADIENT)


def chunking_of(name, **fields) -> ChunkingConfig:
    """Chunking of a named system without the offset that holds its rate, which is ours."""
    held = base_config(name).model.stages[0].chunking
    return replace(held, **({"hold_rate": False} | fields))


def config_of(chunking: ChunkingConfig, d_model: int) -> HNetConfig:
    stages = (
        StageConfig(("p1", "p1"), d_model, chunking=chunking),
        StageConfig(("p1",), d_model),
    )
    return HNetConfig(stages, mixers=(("p", "tests.parts.cheap:Previous"),))


def chunking_stage(chunking: ChunkingConfig, d_model: int):
    """(structure, parameters) of a stage with these parts, around a network that is not used."""
    graph, shapes = abstract(config_of(chunking, d_model))
    return nnx.split(nnx.merge(graph, drawn(shapes, 0)).backbone)


def predictor_params(found, prefix) -> dict:
    """Parameters of our MLP from those of torch: layers 0 and 2 of a sequence."""
    layer = lambda n: {
        "kernel": jnp.asarray(found[f"{prefix}{n}.weight"].T),
        "bias": jnp.asarray(found[f"{prefix}{n}.bias"]),
    }
    return {"fc1": layer(0), "fc2": layer(2)}


def predictor_gradients_agree(grads, found, prefix):
    for name, number in (("fc1", 0), ("fc2", 2)):
        gradients_agree(grads[name]["kernel"].T, found[f"{prefix}{number}.weight"])
        gradients_agree(grads[name]["bias"], found[f"{prefix}{number}.bias"])


KEY = jax.random.key(0)


def loss_sum(chunking, boundaries, logits=None, labels=None):
    """Sum of the losses of a stage, each with its weight; the rows are the whole batch."""
    counts = rate_counts(boundaries, chunking.routes)
    ratios_R = np.float32(chunking.target_ratios)
    return sum(
        loss.weight
        * loss.part()(
            LossInputs(
                boundaries, loss, ratios_R, chunking.has_null_chunk, counts, counts, None, logits,
                labels,
            )
        )
        for loss in chunking.losses
    )  # fmt: skip


def given_boundaries(b_BL, routes_BL=None):
    """These boundaries, with a gradient."""
    graph, params = chunking_stage(chunking_of("dtp_whitespace", predictor="external"), 1)
    ids_BL = np.ones(b_BL.shape, np.int32)
    context = Context(ids_BL, route_ids_BL=routes_BL, external_boundary_BL=b_BL > 0.5)
    own = nnx.merge(graph, params).boundaries(jnp.zeros((*b_BL.shape, 1)), context, 999)
    return own._replace(boundary_ste_BL=b_BL)


def loss_and_gradient(loss, b_BL):
    return quick_jit(jax.value_and_grad(loss))(b_BL)
