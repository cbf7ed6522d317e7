"""Deletion of positions (MrT5): its gate and controller against the numbers of its own code."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hnet.chunking.boundaries import Prediction, decide
from hnet.chunking.config import ChunkingConfig
from hnet.chunking.losses.gate_mean import GateEntropy, GateMean, entropy
from hnet.chunking.part import BoundaryPredictor, LossInputs, Place, Positions
from hnet.chunking.predictors.deletion_gate import DeletionGate
from hnet.chunking.rates import RateCounts, rate_counts
from hnet.config import AttentionConfig
from hnet.errors import ConfigError
from hnet.nn.attention import masked_attention
from hnet.nn.context import Context
from tests.golden_data import load, part, relative_error
from tests.networks import network, quick_jit, random_params, stage

VALUE, GRADIENT = 2e-5, 1e-4


@pytest.mark.parametrize(
    ("kind", "k"), [("scaled_sigmoid", -30.0), ("scaled_sigmoid_default", -10.0)]
)
def test_the_gate_is_mrt5s(kind, k):
    numbers = load("family/mrt5_gate")
    found, config = part(numbers, kind), DeletionGate.Config(scale=k)
    gate = DeletionGate(config, Place(0, 24, 24, ChunkingConfig()), rngs=nnx.Rngs(0))
    assert np.array_equal(gate.feed_forward.bias[...], numbers["init_bias"])
    graph, _ = nnx.split(gate)
    params = {
        "scale": jnp.asarray(found["param/layer_norm.weight"]),
        "feed_forward": {
            "kernel": jnp.asarray(found["param/feed_forward.weight"].T),
            "bias": jnp.asarray(found["param/feed_forward.bias"]),
        },
    }
    h_BLD, cot_BL = numbers["hidden_BLD"], numbers["cot_BL1"][..., 0]
    seen_BL = numbers["ids_BL"] != 0  # the reference gives padding the gate k

    def scalar(params, h_BLD):
        rows = Positions(h_BLD, Context(jnp.ones(h_BLD.shape[:2], jnp.int32)), config)
        found = nnx.merge(graph, params)(rows)
        return jnp.sum(jnp.where(seen_BL, found.extra * cot_BL, 0.0)), found

    run = quick_jit(jax.value_and_grad(scalar, (0, 1), has_aux=True))
    (_, ours), (grads, dh_BLD) = run(params, h_BLD)
    assert relative_error(ours.logit, found["logit_BL1"][..., 0]) < VALUE
    assert relative_error(ours.extra[seen_BL], found["gate_BL1"][..., 0][seen_BL]) < VALUE
    kept = found["gate_BL1"][..., 0][seen_BL] > k / 2
    assert np.array_equal((ours.probability > 0.5)[seen_BL], kept) and 0 < kept.sum() < kept.size
    assert relative_error(dh_BLD, found["grad_hidden_BLD"]) < GRADIENT
    linear = grads["feed_forward"]
    assert relative_error(linear["kernel"].T, found["grad/param/feed_forward.weight"]) < GRADIENT
    assert relative_error(linear["bias"], found["grad/param/feed_forward.bias"]) < GRADIENT
    assert relative_error(grads["scale"], found["grad/param/layer_norm.weight"]) < GRADIENT


def test_a_sink_of_one_is_mrt5s_softmax():
    numbers = part(load("family/mrt5_gate"), "softmax1")
    scores = numbers["in"]
    B, Q, K = scores.shape

    def weights(scores):
        """Attention whose scores are given and whose values are unit vectors."""
        q, k = scores[..., None, :] * np.sqrt(K), jnp.broadcast_to(jnp.eye(K), (B, K, K))
        visible = jnp.ones((B, Q, K), bool)
        out = masked_attention(q, k[:, :, None], k[:, :, None], visible, sink_H=jnp.zeros(1))
        return jnp.sum(out[:, :, 0] * numbers["cot"]), out[:, :, 0]

    (_, out), gradient = jax.value_and_grad(weights, has_aux=True)(jnp.asarray(scores))
    assert relative_error(out, numbers["out"]) < VALUE
    assert relative_error(gradient, numbers["grad"]) < GRADIENT


def test_the_entropy_of_gates_is_mrt5s():
    found = part(load("family/mrt5_controller"), "entropy_reg")
    gate_BL, p_BL = found["gate_BL"], np.exp(found["gate_BL"])
    assert relative_error(np.mean(entropy(p_BL), 1), found["H1_B"]) < VALUE
    assert relative_error(entropy(np.mean(p_BL, 1)), found["H2_B"]) < VALUE
    ids_BL = np.int32(np.arange(23) < 20) * np.ones((3, 1), np.int32)  # 3 positions of padding
    padded_BL = np.pad(gate_BL, ((0, 0), (0, 3)))
    own = decide(Prediction(padded_BL, extra=padded_BL), Context(ids_BL), 23)
    counts = rate_counts(own, 1)
    x = LossInputs(own, GateEntropy.Config(), np.float32([2]), False, counts, counts)
    expected = np.mean(found["H1_B"] - found["H2_B"])
    np.testing.assert_allclose(GateEntropy()(x), expected, rtol=1e-5)


@pytest.mark.parametrize(("kp", "ki"), [(0.5, 1e-5), (1.0, 0.01)])
def test_the_controller_is_mrt5s(kp, ki):
    numbers = part(load("family/mrt5_controller"), f"pi_kp{kp}_ki{ki}")
    loss, config = GateMean(), GateMean.Config(proportional_gain=kp, integral_gain=ki)
    state, found = loss.init(), []
    deleted_T = numbers["deleted_T"]
    P, I = numbers["p_T"][0], numbers["i_T"][0]
    delta = I / ki + deleted_T[0]  # the target is not stored: it follows from the first update
    for deleted in deleted_T:
        counts = RateCounts(*(jnp.asarray([n]) for n in (1e4 * (1 - deleted), 1e4, 0.0)))
        state = loss.next_state(state, counts, jnp.asarray([1 / (1 - delta)]), config)
        found.append((state[0], state[1], jnp.maximum(state[0] + state[1], 0.0)))
    for ours, name in zip(zip(*found), ("p_T", "i_T", "alpha_T")):
        assert relative_error(np.stack(ours), numbers[name]) < 1e-4
    assert P > 0 and int(state[2]) == len(deleted_T)


def deleting(**fields):
    inner = replace(stage("T1", 26), attention=AttentionConfig(sink="one"))
    outer = stage(
        "t1 -", 26, predictor=DeletionGate.Config(**fields), inner_positions="original",
        dechunk="repeat", residual="add", losses=("gate_mean",),
    )  # fmt: skip
    return network(outer, inner)


def test_soft_deletion_is_hard_deletion_with_a_bias_of_minus_infinity():
    """In packed rows, with original positions; with a finite bias only the gradient differs."""
    ids = np.random.default_rng(1).integers(0, 256, (2, 23)).astype(np.int32)
    segments = np.stack([np.ones(23), np.repeat([1, 2, 0], [9, 11, 3])]).astype(np.int32)

    def both(config, sharpness):
        graph, params = random_params(config)
        gate = params["backbone"]["routing_module"]
        gate["feed_forward"] = jax.tree.map(lambda a: sharpness * a, gate["feed_forward"])

        @quick_jit
        def run(params):
            def scalar(params, key):
                logits, (found,) = nnx.merge(graph, params)(ids, segments, key=key)
                seen_BL1 = segments[..., None] != 0
                return jnp.sum(jnp.where(seen_BL1, logits, 0.0) ** 2), (logits, found)

            if sharpness > 1:  # only its values are compared
                return [(scalar(params, key), None) for key in (jax.random.key(0), None)]
            grad = jax.value_and_grad(scalar, has_aux=True)
            return grad(params, jax.random.key(0)), grad(params, None)

        return jax.device_get(run(params))

    both = {True: both(deleting(scale=-1e6), 1e6), False: both(deleting(), 1.0)}
    for large in (True, False):
        ((_, (soft, found)), gradient), ((_, (hard, _)), hard_gradient) = both[large]
        seen = segments != 0
        difference = np.abs(soft - hard)[seen].max()
        assert difference < 1e-5 if large else difference > 1e-3
        mask = found.boundary_mask_BL[seen]
        assert 4 < mask.sum() < mask.size - 4 and found.num_slots_G[1] == 20
        if not large:
            at_gate, hard_at_gate = (
                jax.tree.leaves(grads["backbone"]["routing_module"])
                for grads in (gradient, hard_gradient)
            )
            assert all(np.abs(leaf).max() > 1e-6 for leaf in at_gate)
            assert not any(np.any(leaf) for leaf in hard_at_gate)


@pytest.mark.parametrize("layers", ["m1", "T1g1"])
def test_soft_deletion_is_refused_with_layers_that_would_still_read_deleted_positions(layers):
    config = deleting()
    hidden = lambda config: replace(
        config, stages=(config.stages[0], replace(config.stages[1], arch_layout=(layers,)))
    )
    with pytest.raises(ConfigError, match=r"stages.0.chunking.predictor.soft=True, but layers"):
        hidden(config)
    hidden(deleting(soft=False))


class OwnGate(DeletionGate):
    """A gate of one's own."""


class Biased(BoundaryPredictor):
    """Biases keys."""

    def key_bias(self, prediction, config, training):
        return prediction.logit


def with_predictor(settings, layers, losses=()):
    outer, main = deleting().stages
    chunking = replace(outer.chunking, predictor=settings, losses=losses)
    stages = (replace(outer, chunking=chunking), replace(main, arch_layout=(layers,)))
    return replace(deleting(), stages=stages)


def test_a_predictor_of_ones_own_counts_by_what_it_gives_and_not_by_its_name():
    with_predictor(OwnGate.Config(), "T1", (GateMean.Config(),))
    with pytest.raises(ConfigError, match="which has no gates"):
        with_predictor(Biased.Config(), "T1", (GateMean.Config(),))
    with_predictor(Biased.Config(), "T1")
    with pytest.raises(ConfigError, match=r"predictor='.*:Biased' biases keys, but layers 'm'"):
        with_predictor(Biased.Config(), "m1")
    with_predictor(OwnGate.Config(soft=False), "m1")
