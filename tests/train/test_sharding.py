"""The mesh, and the sharding of every array of a run."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from experiments.configs.systems import hnet, magnet
from hnet.config import PUBLISHED
from hnet.errors import ConfigError
from hnet.model import abstract
from hnet.nn.parameters import describe
from hnet.train.compiled_run import build as build_program
from hnet.train.config import MeshConfig
from hnet.train.sharding import (
    batch_sharding,
    check_batch,
    make_mesh,
    parameter_spec,
    state_shardings,
)
from tests.networks import QUICK
from tests.training import build, tiny_run
from tpu import hlo

path_name = partial(jax.tree_util.keystr, simple=True, separator="/")


def test_the_open_axis_takes_the_devices_that_are_left():
    assert dict(make_mesh(MeshConfig()).shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(make_mesh(MeshConfig(2, -1, 2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    three = make_mesh(MeshConfig(1, 3, 1), jax.devices()[:3])
    assert dict(three.shape) == {"data": 1, "fsdp": 3, "tensor": 1}


@pytest.mark.parametrize(
    ("axes", "says"),
    [
        ((3,), "mesh.data=3 x mesh.fsdp=1 x mesh.tensor=1 does not fit 8 devices"),
        ((-1, 3), "mesh.data=-1 x mesh.fsdp=3 x .* does not fit 8 devices: make the"),
        ((-1, -1), "mesh.data and mesh.fsdp are all -1: leave at most one open"),
        ((0, 8, -2), "mesh.data=0, mesh.tensor=-2: use 1 or more, or -1"),
    ],
)
def test_a_mesh_that_does_not_fit_is_one_line(axes, says):
    with pytest.raises(ConfigError, match=says) as error:
        make_mesh(MeshConfig(*axes))
    assert "\n" not in str(error.value)


def test_rows_that_the_devices_do_not_share_evenly_are_refused():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    check_batch(24, 3, mesh)
    with pytest.raises(ConfigError, match=r"data.batch_size=16 is not .* = 12: use e.g. 24"):
        check_batch(16, 3, mesh)


def test_an_axis_that_is_not_divided_stays_whole():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    by_rows = P(None, ("tensor", "fsdp"), None)
    assert parameter_spec(("mlp", "out"), (5, 12, 7), mesh) == by_rows
    assert parameter_spec(("mlp", "out"), (5, 6, 8), mesh) == P(None, None, None)
    assert parameter_spec(("channels",), (8,), mesh) == P(None)


def test_an_axis_that_the_table_does_not_have_is_refused():
    with pytest.raises(ConfigError, match="parameter axis 'kv' is unknown: use one of embed, "):
        parameter_spec(("embed", "kv"), (8, 8), make_mesh(MeshConfig()))


@pytest.mark.parametrize(
    ("name", "model"),
    [("2stage_L", PUBLISHED["2stage_L"]), ("magnet", magnet()), ("hnet", hnet())],
)
def test_named_axes_give_the_golden_shardings(name, model):
    """The file lists the spec of every parameter that is not replicated on a 2 x 2 x 2 mesh."""
    golden = json.loads((Path(__file__).parents[1] / "golden" / "shardings.json").read_text())[name]
    expected = {path: spec for spec, paths in golden.items() for path in paths}
    graph, params = abstract(model)
    mesh = make_mesh(MeshConfig(2, 2, 2))
    shardings = state_shardings(params, describe(nnx.merge(graph, params)), mesh)
    found = {path_name(p): s.spec for p, s in jax.tree_util.tree_leaves_with_path(shardings)}
    assert {path: repr(spec) for path, spec in found.items() if any(spec)} == expected


def test_optimizer_moments_lie_where_their_parameters_do(tmp_path):
    state = build(tiny_run(tmp_path, mesh=MeshConfig(2, 2, 2))).abstract_state
    name = "backbone/main_network/main_network/layers/0/mlp/fc1/kernel"
    found = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if path_name(path).endswith(name)
    ]
    assert len(found) == 3  # the parameter and both moments
    for leaf in found:
        whole, part = leaf.shape, leaf.sharding.shard_shape(leaf.shape)
        assert np.prod(part) * 4 == np.prod(whole)
        assert leaf.sharding == found[0].sharding


def test_the_tensor_axis_sums_activations_and_moves_nothing_bigger_than_a_weight(tmp_path):
    """Heads and halves of fused projections are where they are used (arXiv 1909.08053)."""
    config = tiny_run(tmp_path, mesh=MeshConfig(1, 1, 2))
    config = replace(config, data=replace(config.data, seq_len=128))
    devices = jax.devices()[:2]
    program = build_program(config, devices=devices, compiler_options=QUICK)
    shape, rows = (config.data.batch_size, config.data.seq_len), batch_sharding(program.mesh)
    kinds = {"input_ids": jnp.int32, "segment_ids": jnp.int32, "loss_mask": jnp.bool_}
    batch = {k: jax.ShapeDtypeStruct(shape, kind, sharding=rows) for k, kind in kinds.items()}
    slots = 96
    lowered = program.step.lower(
        program.abstract_state, batch, program.hparams, capacities=(slots,)
    )
    computations, _ = hlo.parse(lowered.compile().as_text())
    parameters = jax.tree.leaves(program.abstract_state.params)
    weight = max(4 * leaf.size for leaf in parameters)
    width = config.model.stages[1].d_model
    activation = 4 * shape[0] * slots * width
    assert activation > 2 * weight
    sums = 0
    for one in (i for found in computations.values() for i in found):
        size = hlo.shape_bytes(one.shape)
        if one.opcode == "all-reduce" and hlo.part_of(one.op_name) == "stage1/main_network":
            sums += size
        elif one.opcode in hlo.COLLECTIVES and one.opcode != "all-reduce":
            assert size <= weight, one
    assert sums == 4 * activation  # attention and MLP, forward and backward
