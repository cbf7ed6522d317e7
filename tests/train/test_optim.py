"""AdamW, schedules and which parameter gets which learning rate."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from hnet.config import PUBLISHED
from hnet.errors import ConfigError
from hnet.model import abstract
from hnet.nn.parameters import ParameterInfo, describe
from hnet.train.config import OptimConfig
from hnet.train.optim import (
    Hyperparams,
    apply_update,
    direction,
    optimizer,
    schedule,
)
from tests.training import TINY


def test_wsd_warms_up_stays_and_decays_as_one_minus_sqrt():
    config = OptimConfig(schedule="wsd", warmup_frac=0.1, decay_frac=0.2)
    factors = [float(schedule(config, jnp.int32(s), 100)) for s in range(100)]
    assert factors[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert factors[9:80] == pytest.approx([1.0] * 71)
    assert factors[80:83] == pytest.approx([1 - np.sqrt(k / 21) for k in (1, 2, 3)])
    assert 0 < factors[99] < 0.03
    assert all(a >= b for a, b in zip(factors[80:], factors[81:]))


def test_cosine_goes_to_zero():
    config = OptimConfig(schedule="cosine", warmup_frac=0.1)
    factors = [float(schedule(config, jnp.int32(s), 100)) for s in range(101)]
    assert factors[9] == pytest.approx(1.0)
    assert factors[55] == pytest.approx(0.5, abs=0.01)
    assert factors[100] == pytest.approx(0.0, abs=1e-6)


def test_stages_and_decay_of_the_two_stage_network_follow_the_official_groups():
    infos = describe(nnx.merge(*abstract(PUBLISHED["2stage_L"])))
    stages, decayed = {}, {}
    for path, info in jax.tree_util.tree_leaves_with_path(infos):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        stages[name], decayed[name] = info.stage, info.decay
    assert stages["embeddings/embedding"] == stages["lm_head/kernel"] == 0
    assert stages["backbone/encoder/layers/0/mixer/in_proj/kernel"] == 0
    assert stages["backbone/routing_module/q_proj_layer/kernel"] == 0
    assert stages["backbone/main_network/decoder/layers/1/mlp/fc1/kernel"] == 1
    assert stages["backbone/main_network/residual_proj/kernel"] == 1
    assert stages["backbone/main_network/main_network/pad_dimension"] == 2
    assert stages["backbone/main_network/main_network/main_network/rmsnorm/scale"] == 2
    spared = {name.rsplit("/", 1)[1] for name, is_d in decayed.items() if not is_d}
    assert spared == {"scale", "bias", "A_log", "D", "dt_bias", "conv1d_bias"}


def test_update_equals_optax_adamw_when_all_stages_are_alike():
    config = OptimConfig(clip_norm=0.7, weight_decay=0.13)
    rng = np.random.default_rng(0)
    names = {"lm_head": {"kernel": (3, 5)}, "norm": {"scale": (5,)}}
    draw = lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    is_shape = lambda x: isinstance(x, tuple)
    params = jax.tree.map(draw, names, is_leaf=is_shape)
    decayed = {"lm_head": {"kernel": True}, "norm": {"scale": False}}
    infos = jax.tree.map(lambda decay: ParameterInfo(("out",), decay, stage=0), decayed)
    reference = optax.chain(
        optax.clip_by_global_norm(0.7),
        optax.adamw(2e-3, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.13, mask=decayed),
    )
    hparams = Hyperparams(jnp.float32(2e-3), jnp.float32(0.13), jnp.ones(1), 0.0)
    ours, theirs = params, params
    state, reference_state = optimizer(config).init(params), reference.init(params)
    for _ in range(3):
        grads = jax.tree.map(draw, names, is_leaf=is_shape)
        directions, state = direction(config, grads, state)
        ours = apply_update(ours, directions, infos, hparams, jnp.float32(1.0))
        with jax.numpy_dtype_promotion("standard"):
            updates, reference_state = reference.update(grads, reference_state, theirs)
        theirs = optax.apply_updates(theirs, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)


def test_multiplier_scales_the_step_of_its_stage_alone():
    params = {"backbone": {"encoder": jnp.ones(2), "main_network": {"w": jnp.ones(2)}}}
    hparams = Hyperparams(jnp.float32(0.1), jnp.float32(0.0), jnp.array([3.0, 0.5]), 0.0)
    outer, inner = (ParameterInfo(("out",), stage=stage) for stage in (0, 1))
    infos = {"backbone": {"encoder": outer, "main_network": {"w": inner}}}
    ones = jax.tree.map(jnp.ones_like, params)
    out = apply_update(params, ones, infos, hparams, jnp.float32(1.0))
    np.testing.assert_allclose(out["backbone"]["encoder"], 1 - 0.3, rtol=1e-6)
    np.testing.assert_allclose(out["backbone"]["main_network"]["w"], 1 - 0.05, rtol=1e-6)


def test_multipliers_by_formula_none_and_explicit():
    assert OptimConfig(lr_multipliers="none").multipliers(TINY) == (1.0, 1.0)
    assert OptimConfig(lr_multipliers=(2.0, 1.0)).multipliers(TINY) == (2.0, 1.0)
    formula = OptimConfig().multipliers(PUBLISHED["2stage_L"])
    assert formula == pytest.approx((2.63, 1.52, 0.71), abs=0.01)
    with pytest.raises(ConfigError, match="lr_multipliers.*3 numbers for 2 stages"):
        OptimConfig(lr_multipliers=(1.0, 1.0, 1.0)).multipliers(TINY)
    with pytest.raises(ConfigError, match="optim.learning_rate=0"):
        OptimConfig(learning_rate=0.0)
