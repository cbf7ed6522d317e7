"""A class of the user's own as the network inside the innermost stage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hnet.config import HNetConfig, StageConfig
from hnet.decode import stream
from hnet.errors import ConfigError
from hnet.flops import forward_flops, param_counts
from hnet.nn.cache import read, write
from hnet.nn.layers import segment_starts
from hnet.nn.parameters import describe, parameter
from hnet.nn.stack import Stack
from hnet.weights.official import check_official
from tests.networks import network, quick_jit, random_params, stage

D, L = 39, 17


class Leaky(Stack):
    """y = W h, h_t = x_t + h_{t-1} / 2."""

    def __init__(self, config, stage, layout, *, num_residuals, rngs):
        size = (stage.d_model, stage.d_model)
        self.weight = parameter(jax.random.normal(rngs.params(), size) / 9, "embed out")

    @staticmethod
    def problem(config, stage):
        return "num_heads=7: use another" if stage.num_heads == 7 else None

    def states(self, x_BLD, context):
        starts_BL = segment_starts(context.segment_ids_BL)

        def one(h_BD, x):
            x_BD, starts_B = x
            h_BD = x_BD + jnp.where(starts_B[:, None], 0.0, h_BD) / 2
            return h_BD, h_BD

        xs = (x_BLD.swapaxes(0, 1), starts_BL.T)
        return jax.lax.scan(one, jnp.zeros_like(x_BLD[:, 0]), xs)[1].swapaxes(0, 1)

    def __call__(self, x_BLD, context):
        return self.states(x_BLD, context) @ self.weight[...]

    def prefill(self, x_BLD, context, lengths_B, max_len):
        h_BLD = self.states(x_BLD, context)
        last = jax.vmap(lambda h_LD, n: h_LD.at[n - 1].get(mode="clip"))(h_BLD, lengths_B)
        last_BD = jnp.where(lengths_B[:, None] > 0, last, 0.0)
        return h_BLD @ self.weight[...], last_BD[None]

    def step(self, x_RD, caches, rows, context):
        h_RD = x_RD + read(caches, (0, rows)) / 2
        return h_RD @ self.weight[...], write(caches, (0, rows), h_RD)


CONFIG = network(stage("t1 t1", 26), stage(f"{__name__}:Leaky", D))


def test_it_trains_streams_and_is_counted():
    graph, params = random_params(CONFIG)
    ids = np.random.default_rng(0).integers(0, 256, (2, L)).astype(np.int32)

    @quick_jit
    def run(params):
        def scalar(params):
            logits, _ = nnx.merge(graph, params)(ids)
            return jnp.mean(logits**2), logits

        model = nnx.merge(graph, params)
        lengths_B, room = jnp.asarray([5, 0], jnp.int32), stream.full_lens(CONFIG, L)
        cache = stream.prefill(model, ids[:, :5], lengths_B, room)[2]

        def one(carry, _):
            cache, at_B = carry
            byte_B = jnp.asarray(ids)[jnp.arange(2), jnp.minimum(at_B, L - 1)]
            logits, _, cache = stream.step(model, cache, byte_B, at_B < L)
            return (cache, at_B + 1), (logits, at_B)

        steps = jax.lax.scan(one, (cache, lengths_B), length=L)[1]
        return jax.value_and_grad(scalar, has_aux=True)(params), steps

    ((_, logits), grads), steps = jax.device_get(run(params))
    for found, at_B in zip(*steps):
        for row, t in enumerate(at_B):
            if t < L:
                np.testing.assert_allclose(found[row], logits[row, t], rtol=0, atol=1e-5)
    assert np.abs(grads["backbone"]["main_network"]["main_network"]["weight"]).max() > 1e-6
    assert param_counts(CONFIG)["stage1/main_network"] == D * D
    assert describe(nnx.merge(graph, params))["backbone"]["main_network"]
    assert forward_flops(CONFIG, (L, L))["stage1/main_network"].total >= 2 * L * D * D


REFUSED = [
    (f"{__name__}:Nothing", "Nothing' is no subclass of hnet.nn.stack.Stack"),
    (f"{__name__}:HNetConfig", "HNetConfig' is no subclass"),
    ("no_such.module:Net", "network 'no_such.module:Net' cannot be imported"),
    (f"{__name__}:Leaky", "model.stages.0.num_heads=7: use another"),
]


@pytest.mark.parametrize("place, says", REFUSED)
def test_what_cannot_be_built_is_one_line(place, says):
    with pytest.raises(ConfigError, match=says) as error:
        HNetConfig((StageConfig((place,), 26, num_heads=7),))
    assert "\n" not in str(error.value)


def test_the_official_form_refuses_it_by_name():
    for refuse in (check_official, HNetConfig.to_json):
        with pytest.raises(ConfigError, match=r"stages.1.arch_layout=.*:Leaky.* is a class"):
            refuse(network(stage("m1 m1", 26), stage(f"{__name__}:Leaky", D)))
    with pytest.raises(ConfigError, match="layout .*:Leaky' is not a sequence of runs"):
        network(stage(f"m1 {__name__}:Leaky", 26), stage("m1", 26))
