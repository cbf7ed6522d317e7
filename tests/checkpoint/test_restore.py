"""Checkpoints are restored on any mesh, in whole or in part, into the architecture they are of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hnet.checkpoint import manifest
from hnet.checkpoint.save import Checkpointer
from hnet.errors import ConfigError
from hnet.train.config import CheckpointConfig
from tests.checkpoint.states import EXTRAS, abstract, assert_same_bits, make_state, mesh_of


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A work directory with one checkpoint of `make_state()` from the (4, 2) mesh."""
    workdir = tmp_path_factory.mktemp("run")
    with Checkpointer(workdir) as checkpoints:
        checkpoints.save(5, make_state(), EXTRAS)
    return workdir


@pytest.mark.parametrize(
    "mesh, spec",
    [
        (mesh_of((1,), ("x",)), P()),
        (mesh_of((2,), ("rows",)), P("rows")),
        (mesh_of((2, 2), ("fsdp", "tensor")), P(("tensor", "fsdp"))),
        (mesh_of((8,), ("data",)), P("data")),
    ],
)
def test_restore_onto_another_mesh(saved, mesh, spec):
    state = make_state()
    everywhere = NamedSharding(mesh, P())
    wanted = abstract(state, everywhere)
    rows = NamedSharding(mesh, spec)
    wanted.params["w"] = abstract(state.params["w"], rows)
    with Checkpointer(saved) as checkpoints:
        restored = checkpoints.restore(wanted)
    assert_same_bits(restored.state, state)
    assert restored.state.params["w"].sharding == rows
    assert restored.state.params["b"].sharding == everywhere
    assert (restored.step, restored.extras, restored.rejected) == (5, EXTRAS, [])


def test_restored_key_draws_the_same(saved):
    state = make_state()
    with Checkpointer(saved) as checkpoints:
        rng = checkpoints.restore(abstract(state.rng), only="rng").state
    assert jax.random.bits(rng) == jax.random.bits(state.rng)


def test_restore_of_a_subtree_needs_no_more_than_it(saved):
    params = make_state().params
    with Checkpointer(saved) as checkpoints:
        assert_same_bits(checkpoints.restore(abstract(params), only="params").state, params)


def test_manifest_tells_how_to_rebuild(saved):
    with Checkpointer(saved) as checkpoints:
        record = checkpoints.manifest()
        assert checkpoints.latest_good_step() == 5
    assert record.extras == EXTRAS
    assert record.config_hash == manifest.json_hash(EXTRAS["config"])
    leaf = record.leaves["params/b"]
    assert (leaf["shape"], leaf["dtype"]) == ([7], "bfloat16")
    assert record.versions["jax"] == jax.__version__
    assert all((saved / "checkpoints" / "5" / name).is_file() for name in record.files)


def test_state_may_be_donated_while_it_is_saved(tmp_path):
    state = {"w": jnp.arange(1031.0)}
    want = {"w": np.arange(1031.0, dtype=np.float32)}
    add = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    add({"w": jnp.zeros(1031)})  # compile first, so that donation is not delayed
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(0, state, {})
        for _ in range(5):
            state = add(state)
        checkpoints.wait()
        restored = checkpoints.restore(abstract(state)).state
    np.testing.assert_array_equal(restored["w"], want["w"])


# --- another architecture


def test_wrong_architecture_is_one_line_by_path(saved):
    wanted = abstract(make_state())
    wanted.params["w"] = jax.ShapeDtypeStruct((8, 13), jnp.float32)
    wanted.params["router"] = wanted.params.pop("b")
    with Checkpointer(saved) as checkpoints, pytest.raises(ConfigError) as e:
        checkpoints.restore(wanted)
    message = str(e.value)
    assert "\n" not in message
    assert "1 missing in it (params/router)" in message
    assert "1 only in it (params/b)" in message
    assert "params/w: [8, 1031] saved, [8, 13] wanted" in message


def test_other_dtype_only_when_asked(saved):
    params = make_state().params
    wanted = abstract(params) | {"w": jax.ShapeDtypeStruct((8, 1031), jnp.bfloat16)}
    with Checkpointer(saved) as checkpoints:
        with pytest.raises(ConfigError, match="params/w: float32 saved, bfloat16 wanted"):
            checkpoints.restore(wanted, only="params")
    with Checkpointer(saved, CheckpointConfig(cast_dtype=True)) as checkpoints:
        w = checkpoints.restore(wanted, only="params").state["w"]
    assert_same_bits(w, params["w"].astype(jnp.bfloat16))
