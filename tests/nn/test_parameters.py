"""Descriptions of parameters: axes, decay, stage and script groups."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from experiments.configs.systems import magnet
from hnet.config import PUBLISHED
from hnet.model import abstract
from hnet.nn.parameters import (
    ParameterInfo,
    describe,
    map_parameters,
    metadata,
    parameter,
    set_per_script,
    set_stage,
)
from tests.networks import NETWORKS


class Inner(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.proj = nnx.Linear(
            3, 5, rngs=rngs, kernel_metadata=metadata("embed out"),
            bias_metadata=metadata("out", decay=False),
        )  # fmt: skip
        self.gain = parameter(jnp.ones(3), "channels", decay=False)


class Outer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        make = nnx.split_rngs(splits=7)(nnx.vmap(Inner, in_axes=0, out_axes=0))
        self.layers, self.head = make(rngs), parameter(jnp.ones((3, 2)), "embed vocab")


def test_layers_that_vmap_stacks_keep_their_description():
    model = Outer(nnx.Rngs(0))
    assert model.layers.gain.shape == (7, 3)
    set_per_script(model.layers)
    set_stage(model.layers, 2)
    set_stage(model, 1)
    assert describe(model) == {
        "head": ParameterInfo(("embed", "vocab"), stage=1),
        "layers": {
            "gain": ParameterInfo(("channels",), False, True, 2),
            "proj": {
                "bias": ParameterInfo(("out",), False, True, 2),
                "kernel": ParameterInfo(("embed", "out"), True, True, 2),
            },
        },
    }


def test_a_parameter_without_axes_is_refused_by_name():
    model = Outer(nnx.Rngs(0))
    model.layers.extra = nnx.Param(jnp.ones(1))
    with pytest.raises(ValueError, match="parameter layers/extra has no axes: make it with"):
        describe(model)
    with pytest.raises(ValueError, match=r"axes 'embed' do not name the 2 axes of \(3, 2\)"):
        parameter(jnp.ones((3, 2)), "embed")


@pytest.mark.parametrize("config", [*NETWORKS.values(), PUBLISHED["2stage_L"], magnet()])
def test_every_parameter_of_a_network_is_described(config):
    graph, params = abstract(config)
    infos = describe(nnx.merge(graph, params))
    assert jax.tree.structure(infos) == jax.tree.structure(params)
    for (path, info), leaf in zip(
        jax.tree_util.tree_leaves_with_path(infos), jax.tree.leaves(params)
    ):
        names = jax.tree_util.keystr(path, simple=True, separator="/")
        stacked = info.per_script + ("layers/" in names)
        assert leaf.ndim == len(info.axes) + stacked, names
        assert info.stage == min(names.count("main_network"), config.num_chunked), names


def test_parameters_are_found_inside_a_larger_tree():
    infos = {"a": ParameterInfo(("out",)), "b": {"c": ParameterInfo(("embed",))}}
    params = {"a": 1, "b": {"c": 2}}
    tree = (params, [params, 5], 7)
    found = map_parameters(
        lambda info, x, y: (info.axes, x + y), infos, tree, tree, other=lambda x, y: x * y
    )
    inner = {"a": (("out",), 2), "b": {"c": (("embed",), 4)}}
    assert found == (inner, [inner, 25], 49)
