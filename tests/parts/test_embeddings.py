"""Every embedding of the table: streaming, packing and causality, and its own equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hnet.config import HNetConfig, StageConfig
from hnet.errors import ConfigError
from hnet.fields import from_json, to_json
from hnet.nn.context import Context
from hnet.nn.embeddings import EMBEDDINGS
from hnet.nn.embeddings.part import Embedding
from hnet.nn.parameters import describe
from hnet.parts import settings_of
from tests.networks import quick_jit

B, L, V, D = 3, 23, 256, 7
SEGMENTS = np.stack(
    [
        np.ones(L, np.int32),
        np.repeat(np.int32([1, 2, 3]), (9, 11, 3)),
        np.where(np.arange(L) < 17, np.repeat(np.int32([1, 2, 3]), (9, 11, 3)), 0),
    ]
)
ONE_DOCUMENT = np.where(np.arange(L)[None] < np.int32([[L], [7], [0]]), 1, 0).astype(np.int32)
IDS = np.random.default_rng(0).integers(0, V, (B, L)).astype(np.int32)
IDS[:, 9:] = IDS[:, : L - 9]  # a document begins like another


def made(settings) -> Embedding:
    return settings.part(settings, V, D, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("name", EMBEDDINGS.names)
def test_an_embedding_streams_what_it_computes(name):
    """Packed documents, padding, the state after rows of one document, and named axes."""
    embedding = made(settings_of(name, EMBEDDINGS))
    describe(embedding)
    graph, params = nnx.split(embedding)

    @quick_jit
    def both(params, ids_BL, segment_ids_BL):
        part, context = nnx.merge(graph, params), Context(segment_ids_BL)
        slow, state = part._step_through(ids_BL, context)
        return part(ids_BL, context), slow, part.after(ids_BL, context), state

    for segments in (SEGMENTS, ONE_DOCUMENT):
        whole, slow, after, state = jax.device_get(both(params, IDS, segments))
        np.testing.assert_allclose(whole[segments != 0], slow[segments != 0], rtol=0, atol=2e-6)
        assert whole.shape == (B, L, D) and np.std(whole[segments != 0]) > 0.1
    for ours, theirs in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(ours[:2], theirs[:2])
    changed = IDS.copy()
    changed[0, 13:] = (changed[0, 13:] + 1) % V
    again = jax.device_get(both(params, changed, SEGMENTS))[0]
    before = jax.device_get(both(params, IDS, SEGMENTS))[0]
    assert np.array_equal(again[0, :13], before[0, :13])
    assert np.any(again[0, 13:] != before[0, 13:], axis=-1).all()


def test_an_unknown_embedding_and_export_are_one_line():
    stage = StageConfig(("m1",), 64)
    with pytest.raises(ConfigError, match="embedding 'byts' is unknown: use bytes"):
        HNetConfig((stage,), embedding="byts")
    content = to_json(HNetConfig((stage,)))
    assert content["embedding"] == {"name": "bytes"}
    assert from_json(HNetConfig, content | {"embedding": "bytes"}) == HNetConfig((stage,))
    del content["embedding"]
    assert from_json(HNetConfig, content) == HNetConfig((stage,))
    mine = f"{__name__}:Ones"
    config = HNetConfig((stage,), embedding=mine)
    with pytest.raises(ConfigError, match="model.embedding='.*Ones' has no official form"):
        config.to_json()
    part = made(config.embedding)
    x_BLD = part(jnp.asarray(IDS), Context(jnp.asarray(SEGMENTS)))
    assert np.array_equal(x_BLD[:, :, 0], IDS), "the whole rows are derived from the steps"
    with pytest.raises(TypeError, match="no table to tie the head to"):
        part.attend(x_BLD)


class Ones(Embedding):
    """The byte value in every channel."""

    def step(self, state, byte_R):
        return state, jnp.repeat(byte_R.astype(jnp.float32)[:, None], D, axis=1)
