"""Chunking systems against the numbers of their own code (tests/golden/family).

Tolerances (tests/golden/README.md): values 2e-5, gradients 1e-4 of an array's largest
value, masks exact. Networks of MAGNET, FlexiTokens and SpaceByte are compared at the stage that
chunks: encoder states and gradients that come from the decoder and the main network are given.
States are stored time first (L, B, D).
"""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hnet.chunking.boundaries import Prediction, decide
from hnet.chunking.config import ChunkingConfig
from hnet.chunking.losses.bce import entropy_spikes
from hnet.chunking.losses.binomial import Binomial, binomial_nll
from hnet.chunking.losses.cab import CAB
from hnet.chunking.losses.hazard import Hazard, no_start, too_short
from hnet.chunking.losses.hinge import hinge
from hnet.chunking.losses.policy_gradient import PolicyGradient
from hnet.chunking.part import LossInputs
from hnet.chunking.predictors.convolved import fired
from hnet.chunking.predictors.mlp import MLP
from hnet.chunking.rates import rate_counts
from hnet.chunking.slots import open_slots
from hnet.config import HNetConfig, StageConfig
from hnet.loss import targets_kept
from hnet.model import HNetLM, abstract
from hnet.nn.context import Context
from hnet.train.named import base_config
from tests.golden_data import compare_gradients, load, part, relative_error
from tests.networks import drawn, quick_jit
from tests.reference_blocks import Written, layer_norm, layers_of, placed, transformer_xl

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


@pytest.fixture
def noise(monkeypatch):
    """Give the stored uniform numbers, (B, L), to the relaxed Bernoulli instead of drawn ones."""
    told = SimpleNamespace(uniform=None)

    def logistic(key, shape, dtype):
        assert told.uniform.shape == shape
        return jnp.log(told.uniform) - jnp.log1p(-told.uniform)

    monkeypatch.setattr(jax.random, "logistic", logistic)
    return told


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


# --- dynamic token pooling ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gumbel", "threshold"])
def test_dtp_predictor(kind, noise):
    found = load(f"family/dtp_predictor_{kind}")
    settings = MLP.Config(width=40, straight_through=kind == "gumbel")
    noise.uniform = found.get("in/uniform_BL")
    chunking = chunking_of("dtp_gumbel", predictor=settings)
    graph, params = chunking_stage(chunking, 24)
    predictor = predictor_params(found, "param/boundary_predictor.")
    h_BLD = batch_first(found["in/hidden_LBD"])
    context = Context(np.ones(h_BLD.shape[:2], np.int32))

    @quick_jit
    def run(predictor, h_BLD):
        def scalar(predictor, h_BLD):
            stage = nnx.merge(graph, params | {"routing_module": predictor})
            own = stage.boundaries(h_BLD, context, 99, key=KEY)
            soft_BL = stage.routing_module.relax(own.boundary_logit_BL, settings, KEY)
            soft_BL = own.boundary_prob_BL if soft_BL is None else soft_BL
            hard = jnp.sum(own.boundary_ste_BL * found.get("in/cot_hard_BL", 0.0))
            return jnp.sum(soft_BL * found["in/cot_soft_BL"]) + hard, (own, soft_BL)

        return jax.value_and_grad(scalar, (0, 1), has_aux=True)(predictor, h_BLD)

    (_, (own, soft_BL)), (grads, grad_h_BLD) = run(predictor, h_BLD)
    agree(own.boundary_logit_BL, found["out/logit_BL"])
    agree(own.boundary_prob_BL, found["out/prob_BL"])
    agree(soft_BL, found["out/soft_BL"])
    assert np.array_equal(own.boundary_mask_BL, found["out/hard_BL"])
    gradients_agree(grad_h_BLD, batch_first(found["grad/hidden_LBD"]))
    predictor_gradients_agree(grads, found, "grad/param/boundary_predictor.")


def test_dtp_pool():
    """Values and gradients for random, no, all and mixed boundaries; also the upsampling."""
    graph, params = chunking_stage(chunking_of("dtp_whitespace", predictor="external"), 10)
    everything = load("family/dtp_pool")

    @quick_jit
    def run(null_chunk_D, h_BLD, b_BL, y_BSD, cot_BSD, cot_BLD):
        context = Context(jnp.ones(b_BL.shape, jnp.int32), external_boundary_BL=b_BL > 0)
        M = y_BSD.shape[1]
        stage = nnx.merge(graph, params | {"null_group": null_chunk_D})
        own = stage.boundaries(h_BLD, context, M)

        def scalar(null_chunk_D, h_BLD, b_BL, y_BSD):
            stage = nnx.merge(graph, params | {"null_group": null_chunk_D})
            told = own._replace(boundary_ste_BL=b_BL)
            chunks_BSD, _, slots = stage.chunk(h_BLD, context, told, M)
            read_BLD = stage.dechunk_layer(y_BSD, told, slots, stage.chunking.dechunk)
            value = jnp.sum(chunks_BSD * cot_BSD) + jnp.sum(read_BLD * cot_BLD)
            return value, (own, chunks_BSD, read_BLD)

        grad = jax.value_and_grad(scalar, (0, 1, 2, 3), has_aux=True)
        return grad(null_chunk_D, h_BLD, b_BL, y_BSD)

    for kind in ("random", "none", "all", "mixed"):
        found = part(everything, kind)
        cot_BSD = batch_first(found["cot_shortened_SBD"])
        cot_BLD = batch_first(found.get("cot_upsampled_LBD", np.zeros((29, 4, 10), np.float32)))
        y_BSD = batch_first(found["y_SBD"]) if "y_SBD" in found else np.zeros_like(cot_BSD)
        h_BLD, b_BL = batch_first(found["hidden_LBD"]), found["boundary_BL"]
        (_, (own, chunks_BSD, read_BLD)), grads = run(
            found["null_D"], h_BLD, b_BL, y_BSD, cot_BSD, cot_BLD
        )
        assert np.array_equal(own.boundary_mask_BL, b_BL)
        shortened_BSD = batch_first(found["shortened_SBD"])
        used = 1 + own.num_boundaries_B.astype(int)
        for b in range(len(used)):  # later slots are of unfinished groups, which are not read
            agree(chunks_BSD[b, : used[b]], shortened_BSD[b, : used[b]])
        gradients_agree(grads[0], found["grad_down_null_11D"][0, 0])
        if "grad_down_hidden_LBD" not in found:
            continue
        agree(read_BLD, batch_first(found["upsampled_LBD"]))
        gradients_agree(grads[1], batch_first(found["grad_down_hidden_LBD"]))
        gradients_agree(grads[3], batch_first(found["grad_up_y_SBD"]))
        # the upsampling's gradient by boundaries is rounding noise in the reference, 0 in ours
        assert np.abs(found["grad_up_boundary_BL"]).max() < 1e-6
        gradients_agree(grads[2], found["grad_down_boundary_BL"])


KINDS = {"gumbel": "gumbel", "entropy": "entropy", "unigram": "unigram",
         "whitespaces": "whitespace", "fixed": "fixed"}  # fmt: skip


def dtp_model(weights: dict, chunking: ChunkingConfig) -> tuple[HNetLM, Callable]:
    """The network with the stacks of its code, and our parameters from its own."""
    D, V = weights["word_emb.weight"].shape[::-1]
    model = HNetLM(config_of(chunking, D), rngs=nnx.Rngs(0))
    names = ["layers.0", "layers.1", "layers.2"]
    of_stack = {
        name: {k: a for k, a in weights.items() if k.startswith((name, "r_", "down_ln"))}
        for name in names
    }

    def blocks(name):
        def run(w, x_BLD, context):
            if name == "layers.1":
                x_BLD = layer_norm(w, "down_ln", x_BLD)
            for layer in layers_of(w, name):
                x_BLD = transformer_xl(w, layer, x_BLD, context.segment_ids_BL)
            return x_BLD

        return Written(run, of_stack[name])

    outer, main = model.backbone, model.backbone.main_network
    outer.encoder, main.main_network, outer.decoder = map(blocks, names)
    model.lm_head = nnx.Linear(D, V, rngs=nnx.Rngs(0))
    stacks = dict(zip(names, ("encoder", "main_network/main_network", "decoder")))

    def params(w):
        found = {
            "embeddings/embedding": jnp.pad(w["word_emb.weight"], ((0, 256 - V), (0, 0))),
            "backbone/null_group": w["null_group"][0, 0],
            "lm_head": {"kernel": w["final_cast.weight"].T, "bias": w["final_cast.bias"]},
        }
        for name, at in stacks.items():
            found |= {f"backbone/{at}/w/{k}": w[k] for k in of_stack[name]}
        if chunking.predictor.part.is_learned:
            prefix = "boundary_predictor.boundary_predictor."
            found["backbone/routing_module"] = predictor_params(w, prefix)
        return found

    return model, params


@pytest.mark.few("kind", ["gumbel", "entropy"], [*KINDS])
def test_dtp_network(kind, noise):
    """Its whole network: boundaries, logits, losses, and gradients of all parameters.

    Rules of white space and of fixed chunks: boundaries are given.
    """
    found, stored = load(f"family/dtp_net_{kind}"), load("family/dtp_net_gumbel")
    weights, ids_BL = part(stored, "param") | part(found, "param"), found["in/data_LB"].T
    noise.uniform = found.get("in/uniform_BL")
    chunking = chunking_of(f"dtp_{KINDS[kind]}")
    if is_learned := chunking.predictor.name == "mlp":
        chunking = replace(chunking, predictor=replace(chunking.predictor, width=32))
    else:
        chunking = replace(chunking, predictor="external", losses=())
    labels_BL = found["in/boundaries_LB"].T if "in/boundaries_LB" in found else None
    model, params = dtp_model(weights, chunking)
    graph, state = nnx.split(model)
    tree = nnx.to_pure_dict(state)
    options = {} if is_learned else {"boundaries_BL": found["inter/hard_BL"] > 0}

    @quick_jit
    def run(weights):
        def scalar(weights):
            model = nnx.merge(graph, placed(tree, params(weights)))
            logits_BLV, (own,) = model(ids_BL, key=KEY, capacities=(99,), **options)
            nll_BLV = -jax.nn.log_softmax(logits_BLV)
            nll_BL1 = jnp.take_along_axis(nll_BLV, found["in/target_LB"].T[..., None], -1)
            aux = loss_sum(chunking, own, logits_BLV, labels_BL)
            return jnp.mean(nll_BL1) + aux, (logits_BLV, own, nll_BL1[..., 0], aux)

        return jax.value_and_grad(scalar, has_aux=True)(weights)

    (total, (logits_BLV, own, nll_BL, aux)), grads = jax.device_get(run(weights))
    assert np.array_equal(own.boundary_mask_BL, found["inter/hard_BL"])
    if is_learned:
        agree(own.boundary_logit_BL, found["inter/boundary_logit_BL"])
    if "out/logit_XV" in found:
        agree(
            np.moveaxis(logits_BLV, 0, 1).reshape(-1, logits_BLV.shape[-1]), found["out/logit_XV"]
        )
    agree(nll_BL.T, found["out/nll_LB"])
    agree(total, found["out/total"])
    agree(aux, found["out/loss_boundaries"])
    compare_gradients(grads, found, part(stored, "signs"))


# --- losses -------------------------------------------------------------------------------------

LOSSES = load("family/dtp_magnet_flexi_losses")


def given_boundaries(b_BL, routes_BL=None):
    """These boundaries, with a gradient."""
    graph, params = chunking_stage(chunking_of("dtp_whitespace", predictor="external"), 1)
    ids_BL = np.ones(b_BL.shape, np.int32)
    context = Context(ids_BL, route_ids_BL=routes_BL, external_boundary_BL=b_BL > 0.5)
    own = nnx.merge(graph, params).boundaries(jnp.zeros((*b_BL.shape, 1)), context, 999)
    return own._replace(boundary_ste_BL=b_BL)


def loss_and_gradient(loss, b_BL):
    return quick_jit(jax.value_and_grad(loss))(b_BL)


@pytest.mark.parametrize("alpha", ["0.2", "0.37", "0.08", "0.1"])
def test_binomial(alpha):
    found = part(LOSSES, f"binomial/{alpha}")
    chunking = chunking_of("dtp_gumbel", target_ratio=1 / float(alpha))
    loss, grad = loss_and_gradient(
        lambda b_BL: loss_sum(chunking, given_boundaries(b_BL)), found["preds_BL"]
    )
    agree(loss, found["loss"])
    gradients_agree(grad, found["grad_preds_BL"])


def test_label_loss_of_the_named_configurations():
    """As in its code, a sigmoid of the probability."""
    found = part(LOSSES, "bce_double_sigmoid")
    chunking = chunking_of("dtp_unigram")

    def loss(p_BL):
        own = given_boundaries(found["p_BL"])._replace(boundary_prob_BL=p_BL)
        return loss_sum(chunking, own, labels=found["label_BL"])

    value, grad = loss_and_gradient(loss, found["p_BL"])
    agree(value, found["loss"])
    gradients_agree(grad, found["grad_p_BL"])
    assert chunking_of("dtp_entropy").losses[0] == replace(chunking.losses[0], labels="entropy")


def test_entropy_spikes():
    found = part(LOSSES, "spikes")
    ids_BL = np.ones(found["label_LB"].T.shape, np.int32)
    spikes_BL = quick_jit(entropy_spikes)(batch_first(found["logits_LBV"]), ids_BL)
    assert np.array_equal(spikes_BL, found["label_LB"].T)


@pytest.mark.parametrize("sigmas", [1, 3])
def test_hinge(sigmas):
    """A row has the band of its language; the loss is the mean over rows, whatever their length."""
    found, bands = part(LOSSES, f"hinge/lambda{sigmas}_full"), part(LOSSES, "hinge")
    upper_R, sigma_R = bands["upper_B"], bands["sigma_B"]
    named = chunking_of("flexitokens")
    band = replace(
        named.losses[0], sigmas=tuple(map(float, sigma_R)), num_sigmas=float(sigmas),
        average="routes",
    )  # fmt: skip
    ratios = tuple(float(1 / upper) for upper in upper_R)
    chunking = replace(named, routes=len(ratios), route_target_ratios=ratios, losses=(band,))
    routes_BL = np.repeat(np.arange(len(upper_R), dtype=np.int32)[:, None], 64, 1)
    loss, grad = loss_and_gradient(
        lambda b_BL: loss_sum(chunking, given_boundaries(b_BL, routes_BL=routes_BL)),
        found["preds_BL"],
    )
    agree(loss, found["loss"])
    gradients_agree(grad, found["grad_preds_BL"])


@pytest.mark.parametrize("sigmas", [1, 3])
def test_hinge_of_padded_rows_as_its_code_has_it(sigmas):
    """With padding its code compares every row's rate with the bands of all rows (an array is
    broadcast); ours compares it with the row's own band. Their function of one pair is the same."""
    found, bands = part(LOSSES, f"hinge/lambda{sigmas}_padded"), part(LOSSES, "hinge")
    upper_B, mask_BL = bands["upper_B"], bands["attention_mask_BL"].astype(np.float32)
    lower_B = upper_B - np.float32(sigmas) * bands["sigma_B"]

    def of_all_pairs(b_BL):
        rate_B = jnp.sum(b_BL * mask_BL, axis=1) / jnp.sum(mask_BL, axis=1)
        return jnp.mean(hinge(rate_B[:, None], upper_B[None], lower_B[None]))

    loss, grad = loss_and_gradient(of_all_pairs, found["preds_BL"])
    agree(loss, found["loss"])
    gradients_agree(grad, found["grad_preds_BL"])


def test_binomial_with_the_rates_of_languages():
    """`use_binomial` of FlexiTokens; its other use is in MAGNET's code for rows with padding, where
    it is not divided by the number of positions."""
    found, upper_R = part(LOSSES, "flexi_binomial"), part(LOSSES, "hinge")["upper_B"]
    ratios = tuple(float(1 / upper) for upper in upper_R)
    named = chunking_of("flexitokens")
    chunking = replace(
        named, routes=len(ratios), route_target_ratios=ratios, losses=(Binomial.Config(),)
    )
    routes_BL = np.repeat(np.arange(len(ratios), dtype=np.int32)[:, None], 64, 1)
    loss, grad = loss_and_gradient(
        lambda b_BL: loss_sum(chunking, given_boundaries(b_BL, routes_BL=routes_BL)),
        found["preds_BL"],
    )
    agree(loss, found["loss"])
    gradients_agree(grad, found["grad_preds_BL"])

    found, mask_BL = part(LOSSES, "magnet_padded_binomial"), LOSSES["hinge/attention_mask_BL"]
    mask_BL = found.get("attention_mask_BL", mask_BL).astype(np.float32)

    def not_divided(b_BL):
        n_B = mask_BL.sum(1)
        return jnp.mean(binomial_nll(jnp.sum(b_BL * mask_BL, axis=1), n_B, np.float32(0.2)))

    loss, grad = loss_and_gradient(not_divided, found["preds_BL"])
    agree(loss, found["loss"])
    gradients_agree(grad, found["grad_preds_BL"])


# --- MAGNET and FlexiTokens ---------------------------------------------------------------------


def test_magnet_network(noise):
    """Boundaries, losses by script, and gradients of each script's predictor."""
    found, scripts = load("family/magnet_net"), ("latin", "cyrl", "deva")
    script_B = found["in/ids_B1L"][:, 0] - 257
    noise.uniform = found["in/uniform_BL"]
    chunking = chunking_of("magnet", predictor=MLP.Config(width=24))
    graph, params = chunking_stage(chunking, 16)
    made = [
        predictor_params(found, f"param/script_to_bp_layers.{script}.boundary_predictor.")
        for script in scripts
    ]
    # route 0 is for all other scripts; routes 1 to 3 are those of the configuration
    stacked = jax.tree.map(lambda *leaves: jnp.stack([jnp.zeros_like(leaves[0]), *leaves]), *made)
    B, L = script_B.size, 33

    def together(kind, axis):  # the code groups rows by script
        rows = np.zeros((B, L, *found[f"{kind}/latin/{axis}"].shape[2:]), np.float32)
        for r, script in enumerate(scripts):
            own = found[f"{kind}/{script}/{axis}"]
            rows[script_B == r] = own if axis.endswith("_BL") else batch_first(own)
        return rows

    h_BLD, cot_BL = together("inter", "hidden_LBD"), together("intergrad", "hard_BL")
    routes_BL = np.repeat(script_B[:, None] + 1, L, 1).astype(np.int32)
    context = Context(np.ones((B, L), np.int32), route_ids_BL=routes_BL)
    assert np.allclose([1 / N for N in chunking.target_ratios[1:]], (0.2, 0.1, 0.08))

    @quick_jit
    def run(predictor):
        def scalar(predictor):
            stage = nnx.merge(graph, params | {"routing_module": predictor})
            own = stage.boundaries(h_BLD, context, 99, key=KEY)
            return jnp.sum(own.boundary_ste_BL * cot_BL), (own, loss_sum(chunking, own))

        return jax.value_and_grad(scalar, has_aux=True)(predictor)

    (_, (own, aux)), grads = run(stacked)
    assert np.array_equal(own.boundary_mask_BL, together("inter", "hard_BL"))
    agree(aux, found["out/aux_mean"])
    agree(found["out/aux_per_script"].mean(), found["out/aux_mean"])
    for r, script in enumerate(scripts):
        own_grads = jax.tree.map(lambda g, r=r: g[r + 1], grads)
        prefix = f"grad/param/script_to_bp_layers.{script}.boundary_predictor."
        predictor_gradients_agree(own_grads, found, prefix)


def test_flexitokens_network(noise):
    """Boundaries, the hinge with the bands of the rows, and the predictor's gradients."""
    found = load("family/flexitokens_net")
    upper_B, noise.uniform = found["in/upper_B"], found["in/uniform_BL"]
    languages, routes_B = np.unique(upper_B, return_inverse=True)
    sigmas = [float(found["in/sigma_B"][list(upper_B).index(u)]) for u in languages]
    named = chunking_of("flexitokens")
    chunking = replace(
        named, predictor=MLP.Config(width=24), routes=len(languages),
        route_target_ratios=tuple(float(1 / u) for u in languages),
        losses=(replace(named.losses[0], sigmas=tuple(sigmas)),),
    )  # fmt: skip
    graph, params = chunking_stage(chunking, 16)
    prefix = "script_to_bp_layers.en.boundary_predictor."
    h_BLD = batch_first(found["inter/hidden_LBD"])
    routes_BL = np.repeat(routes_B[:, None], h_BLD.shape[1], 1).astype(np.int32)
    context = Context(np.ones(routes_BL.shape, np.int32), route_ids_BL=routes_BL)

    @quick_jit
    def run(predictor):
        def scalar(predictor):
            stage = nnx.merge(graph, params | {"routing_module": predictor})
            own = stage.boundaries(h_BLD, context, 99, key=KEY)
            cot_BL = found["intergrad/hard_BL"]
            return jnp.sum(own.boundary_ste_BL * cot_BL), (own, loss_sum(chunking, own))

        return jax.value_and_grad(scalar, has_aux=True)(predictor)

    (_, (own, aux)), grads = run(predictor_params(found, f"param/{prefix}"))
    assert np.array_equal(own.boundary_mask_BL, found["inter/hard_BL"])
    agree(aux, found["out/aux"][0])
    predictor_gradients_agree(grads, found, f"grad/param/{prefix}")


# --- SpaceByte ----------------------------------------------------------------------------------

SPACEBYTE = load("family/spacebyte_net")


@pytest.mark.parametrize("kind", ["overflows", "periodic"])
def test_spacebyte_network(kind):
    """Boundaries, states of the global blocks, insertion, their gradients, and what is trained
    after an overflow. Its BOS (255) begins a document in ours, so it is a boundary in both."""
    found = part(SPACEBYTE, kind)
    name = "hnet_pool" if kind == "periodic" else "spacebyte"
    chunking = chunking_of(name, dechunk="at_boundaries", residual="add")
    graph, params = chunking_stage(chunking, 16)
    ids_BL, h_BLD = found["in/tokens_BL"], found["inter/h_BLD"]
    segments_BL = 1 + np.cumsum(ids_BL == 255, axis=1, dtype=np.int32)
    if kind == "periodic":
        segments_BL = np.ones_like(segments_BL)
    y_BMD = found["inter/global_out_BMD"][..., 16:]  # its narrow states are the last channels
    M = y_BMD.shape[1]
    cot_BMD = found["intergrad/global_in_BMD"][..., 16:]
    context = Context(segments_BL, bytes_BL=ids_BL)

    @quick_jit
    def run(h_BLD, y_BMD):
        def scalar(h_BLD, y_BMD):
            stage = nnx.merge(graph, params)
            own = stage.boundaries(h_BLD, context, M)
            chunks_BMD, _, slots = stage.chunk(h_BLD, context, own, M)
            read_BLD = stage.dechunk_layer(y_BMD, own, slots, chunking.dechunk)
            out_BLD = read_BLD + stage.residual(h_BLD)
            value = jnp.sum(out_BLD * found["intergrad/decoder_in_BLD"])
            return value + jnp.sum(chunks_BMD * cot_BMD), (own, chunks_BMD, out_BLD)

        return jax.value_and_grad(scalar, (0, 1), has_aux=True)(h_BLD, y_BMD)

    (_, (own, chunks_BMD, out_BLD)), (grad_h_BLD, grad_y_BMD) = run(h_BLD, y_BMD)
    assert np.array_equal(own.boundary_mask_BL, found["out/global_position_BL"])
    padded_BMD = found["inter/global_in_BMD"]  # zeros in front, then positions are added
    for row, used in enumerate(np.minimum(own.num_boundaries_B.astype(int), M)):
        positions_MD = padded_BMD[row, :used, 16:] - chunks_BMD[row, :used]
        agree(positions_MD, padded_BMD[0, :used, 16:] - chunks_BMD[0, :used])
    agree(out_BLD, found["inter/decoder_in_BLD"])
    gradients_agree(grad_h_BLD, found["intergrad/h_BLD"])
    gradients_agree(grad_y_BMD, found["intergrad/global_out_BMD"][..., 16:])

    batch = {"input_ids": ids_BL, "segment_ids": np.ones_like(ids_BL),
             "loss_mask": np.arange(48)[None] > np.zeros((3, 1))}  # fmt: skip
    kept_BL = targets_kept(config_of(chunking, 16), [own], batch)
    assert np.array_equal(kept_BL[:, 1:], found["in/targets_after_BL"][:, :-1] >= 0)
    if kind == "overflows":
        assert 0.3 < 1 - kept_BL[:, 1:].mean() < 0.5


# --- CIF ----------------------------------------------------------------------------------------

CIF_NUMBERS = load("family/cif")


def torch_cif(found) -> dict:
    """Parameters of our predictor from those of CifPredictor."""
    return {
        "taps": jnp.asarray(found["cif_conv1d.weight"][:, 0].T),
        "taps_bias": jnp.asarray(found["cif_conv1d.bias"]),
        "out": {
            "kernel": jnp.asarray(found["cif_output.weight"].T),
            "bias": jnp.asarray(found["cif_output.bias"]),
        },
    }


def test_cif():
    """Weights, fires, chunk vectors, and their gradients by states and all parameters."""
    found = part(CIF_NUMBERS, "CifPredictor_free")
    chunking = chunking_of("cif")
    graph, params = chunking_stage(chunking, 8)
    h_BLD, lengths_B = found["in/hidden_BLD"], found["in/lengths_B"]
    ids_BL = (np.arange(h_BLD.shape[1])[None] < lengths_B[:, None]).astype(np.int32)
    M = found["out/embeds_BMD"].shape[1] + 1  # after the null chunk

    @quick_jit
    def run(predictor, h_BLD):
        def scalar(predictor, h_BLD):
            stage = nnx.merge(graph, params | {"routing_module": predictor})
            own = stage.boundaries(h_BLD, Context(ids_BL), M)
            chunks_BMD, inner, _ = stage.chunk(h_BLD, Context(ids_BL), own, M)
            used_BM1 = (inner.segment_ids_BL != 0)[:, 1:, None]
            vectors_BMD = jnp.where(used_BM1, chunks_BMD[:, 1:], 0.0)
            # its code adds its loss: mean over rows of |sum of weights - target|, above the target
            over = jnp.sum(jnp.where(ids_BL != 0, own.extra.weight, 0.0)) / len(ids_BL)
            return jnp.sum(vectors_BMD * found["in/cot_BMD"]) + over, (own, vectors_BMD)

        return jax.value_and_grad(scalar, (0, 1), has_aux=True)(predictor, h_BLD)

    predictor = torch_cif(part(found, "param"))
    (_, (own, vectors_BMD)), (grads, grad_h_BLD) = run(predictor, h_BLD)
    agree(np.where(ids_BL, own.extra.weight, 0), found["out/alphas_BL"])
    assert np.array_equal(own.boundary_mask_BL, (found["out/fires_BL"] >= 1) & (ids_BL != 0))
    agree(vectors_BMD, found["out/embeds_BMD"])
    gradients_agree(grad_h_BLD, found["grad/hidden_BLD"])
    expected = torch_cif(part(found, "grad/param"))
    jax.tree.map(gradients_agree, grads, expected)


def cif_weights(found: dict, h_BLD, right: jax.Array, scale: jax.Array, tail: jax.Array):
    """Weights as in both versions of its code: `right` positions of right context, scaled to the
    target or not, with a weight after the end or not. h_BLD has room for it."""
    w, target_B = part(found, "param"), found.get("in/target_B", np.ones(3, np.float32))
    L, length_B1 = h_BLD.shape[1], found["in/lengths_B"][:, None]
    is_full = w["cif_conv1d.weight"].shape[1] > 1
    padded = jnp.pad(h_BLD, ((0, 0), (2, 2), (0, 0)))
    taps = [jax.lax.dynamic_slice_in_dim(padded, right + i, L, axis=1) for i in range(3)]
    spec = "bld,ed->ble" if is_full else "bld,d->bld"
    kernel = w["cif_conv1d.weight"] if is_full else w["cif_conv1d.weight"][:, 0]
    convolved = sum(jnp.einsum(spec, x, kernel[..., i]) for i, x in enumerate(taps))
    convolved = convolved + w["cif_conv1d.bias"][None, None] + (0 if is_full else h_BLD)
    out = w["cif_output.weight"][0][None, None]
    weight_BL = jax.nn.sigmoid(
        jnp.sum(jax.nn.relu(convolved) * out, axis=-1) + w["cif_output.bias"][None]
    )
    index_1L = jnp.arange(L, dtype=jnp.int32)[None]
    weight_BL = jnp.where(index_1L < length_B1, weight_BL, 0.0)
    sum_B = jnp.sum(weight_BL, axis=1)
    scaled_BL = weight_BL * (target_B / sum_B)[:, None]
    weight_BL = jnp.where(scale, scaled_BL, weight_BL)
    tail_BL = jnp.where(index_1L == length_B1, CIF_TAIL, 0.0)
    return weight_BL + jnp.where(tail, tail_BL, 0.0), sum_B


CIF_TAIL = 0.45  # threshold of its tail, added after the end


@pytest.mark.few("version", [""], ["", "V2"])
def test_cif_integrates(version):
    """Chunk vectors and gradients of both predictors: free, with a tail, not causal, and scaled to
    a target number of chunks, with which rounding decides whether the last position fires. The
    weights are theirs; ours are causal, not scaled, and have no tail."""
    graph, params = chunking_stage(chunking_of("cif"), 8)
    L, M = 27, 24
    ids_BL = np.ones((3, L), np.int32)
    context = Context(ids_BL)

    @quick_jit
    def run(found, h_BLD, cot_BMD, right, scale, tail):
        def scalar(weights, h_BLD):
            weight_BL, sum_B = cif_weights(found | weights, h_BLD, right, scale, tail)
            own = decide(fired(weight_BL, ids_BL), context, M, has_null_chunk=True)
            chunks_BMD, _, _ = nnx.merge(graph, params).chunk(h_BLD, context, own, M)
            used_BM = jnp.arange(M - 1, dtype=jnp.int32)[None] < own.num_boundaries_B[:, None]
            vectors_BMD = jnp.where(used_BM[..., None], chunks_BMD[:, 1:], 0.0)
            # its code adds |number of chunks - target|, here above the target; floored with a tail
            over = jnp.where(tail, 0.0, jnp.mean(sum_B))
            return jnp.sum(vectors_BMD * cot_BMD) + over, (own, weight_BL, vectors_BMD, sum_B)

        weights = {k: a for k, a in found.items() if k.startswith("param/")}
        return jax.value_and_grad(scalar, (0, 1), has_aux=True)(weights, h_BLD)

    for kind in ("free", "tail", "noncausal", "train"):
        found = part(CIF_NUMBERS, f"CifPredictor{version}_free")  # others have its inputs
        found = {k: a for k, a in found.items() if k.startswith(("in/", "param/"))}
        found |= part(CIF_NUMBERS, f"CifPredictor{version}_{kind}")
        is_scaled, has_tail = kind in ("noncausal", "train"), kind == "tail"
        right = np.int32(kind == "noncausal")
        h_BLD = np.pad(found["in/hidden_BLD"], ((0, 0), (0, L - 26), (0, 0)))
        cot_BMD = np.zeros((3, M - 1, 8), np.float32)
        cot_BMD[:, : found["in/cot_BMD"].shape[1]] = found["in/cot_BMD"]
        inputs = {k: a for k, a in found.items() if k.startswith(("in/len", "in/tar", "param/"))}
        inputs.setdefault("in/target_B", np.ones(3, np.float32))
        (_, out), (grads, grad_h_BLD) = run(
            inputs, h_BLD, cot_BMD, right, np.bool_(is_scaled), np.bool_(has_tail)
        )
        own, weight_BL, vectors_BMD, sum_B = jax.device_get(out)
        more = ((0, 0), (0, L - found["out/alphas_BL"].shape[1]))
        agree(weight_BL, np.pad(found["out/alphas_BL"], more))
        number_B = np.floor(sum_B + CIF_TAIL) if has_tail else sum_B
        agree(number_B, found["out/token_num_B"])
        if is_scaled:
            quantity = np.abs(number_B - found["in/target_B"]).mean()
            agree(quantity, found["out/quantity_loss"])
        fires_BL = np.pad((found["out/fires_BL"] >= 1), more) & (weight_BL > 0)
        for row, fires_L in enumerate(fires_BL):
            end = np.flatnonzero(weight_BL[row])[-1] + (not is_scaled)
            assert np.array_equal(own.boundary_mask_BL[row, :end], fires_L[:end])
            used = fires_L[:end].sum()
            assert used > 4
            agree(vectors_BMD[row, :used], found["out/embeds_BMD"][row, :used])
        gradients_agree(grad_h_BLD[:, :26], found["grad/hidden_BLD"])
        for name, ours in grads.items():
            gradients_agree(ours, found[f"grad/{name}"])


def test_cif_integrators():
    """Both of its integrators, on given weights, with gradients; row 0 fires at exactly 1."""
    found, ids_BL = part(CIF_NUMBERS, "integrate"), np.ones((3, 26), np.int32)
    graph, params = chunking_stage(chunking_of("cif"), 8)
    told = {kind: part(CIF_NUMBERS, f"integrate_{kind}") for kind in ("loop", "prefix_sums")}
    M = told["loop"]["embeds_BMD"].shape[1]

    @quick_jit
    def run(weight_BL, h_BLD, cot_BMD):
        def scalar(weight_BL, h_BLD):
            own = decide(fired(weight_BL, ids_BL), Context(ids_BL), 26, has_null_chunk=True)
            chunks_BMD, _, _ = nnx.merge(graph, params).chunk(h_BLD, Context(ids_BL), own, 26)
            used_BM = jnp.arange(M, dtype=jnp.int32)[None] < own.num_boundaries_B[:, None]
            vectors_BMD = jnp.where(used_BM[..., None], chunks_BMD[:, 1 : M + 1], 0.0)
            return jnp.sum(vectors_BMD * cot_BMD), (own, vectors_BMD)

        return jax.value_and_grad(scalar, (0, 1), has_aux=True)(weight_BL, h_BLD)

    for numbers in told.values():
        inputs = found["alphas_BL"], found["hidden_BLD"], numbers["cot_BMD"]
        (_, (own, vectors_BMD)), (grad_BL, grad_h_BLD) = run(*inputs)
        assert np.array_equal(own.boundary_mask_BL[1:], numbers["fires_BL"][1:] >= 1)
        agree(vectors_BMD[1:], numbers["embeds_BMD"][1:])
        gradients_agree(grad_h_BLD[1:], numbers["grad_hidden_BLD"][1:])
        gradients_agree(grad_BL[1:], numbers["grad_alphas_BL"][1:])


# --- Bolmo --------------------------------------------------------------------------------------


@pytest.mark.parametrize("lookahead", [0, 1])
def test_bolmo(lookahead):
    """log p, boundaries, pooled and repeated states, and gradients; rows that begin late.

    With one byte of lookahead its boundary at t is ours at t + 1; its first position is always a
    boundary and its last one never. Its boundaries of the k largest p of a row are not followed.
    """
    found = load("family/bolmo")
    told = part(found, f"lookahead{lookahead}")
    chunking = chunking_of("bolmo")
    graph, params = chunking_stage(chunking, 12)
    h_BLD, cot_BL = found["hidden_BLD"], found["cot_BL"]
    ours, theirs = (slice(2, None), slice(1, -1)) if lookahead else (slice(1, None),) * 2
    projections = {
        name: {"kernel": jnp.asarray(found[f"param/{name}.weight"].T)}
        for name in ("q_proj_layer", "k_proj_layer")
    }
    context = Context(np.ones(h_BLD.shape[:2], np.int32))

    @quick_jit
    def run(predictor, h_BLD):
        def scalar(predictor, h_BLD):
            stage = nnx.merge(graph, params | {"routing_module": predictor})
            own = stage.boundaries(h_BLD, context, 31)
            log_p_BL = jnp.log(own.boundary_prob_BL)
            value = jnp.sum(log_p_BL[:, ours] * cot_BL[:, theirs])
            chunks_BMD, inner, _ = stage.chunk(h_BLD, context, own, 31)
            late = stage.boundaries(h_BLD, Context(late_ids_BL), 31)
            return value, (own, log_p_BL, chunks_BMD, late)

        return jax.value_and_grad(scalar, (0, 1), has_aux=True)(predictor, h_BLD)

    start_B = told["start_B"]
    late_ids_BL = (np.arange(h_BLD.shape[1])[None] >= start_B[:, None]).astype(np.int32)
    (_, (own, log_p_BL, chunks_BMD, late)), (grads, grad_h_BLD) = run(projections, h_BLD)
    for row, start in enumerate(start_B):
        at = slice(start + 1 + lookahead, None), slice(start + 1, -1 if lookahead else None)
        late_p_L, late_L = late.boundary_prob_BL[row], late.boundary_mask_BL[row]
        agree(jnp.log(late_p_L[at[0]]), told["logprob_with_start_BL"][row, at[1]])
        wanted_L = told["mask_with_start_BL"][row]
        assert np.array_equal(late_L[at[0]], wanted_L[at[1]])
        assert late_L[start] and wanted_L[start] and not wanted_L[:start].any()
    agree(log_p_BL[:, ours], told["logprob_BL"][:, theirs])
    assert np.array_equal(own.boundary_mask_BL[:, ours], told["mask_BL"][:, theirs])
    gradients_agree(grad_h_BLD, told["grad_hidden_BLD"])
    for name in projections:
        gradients_agree(grads[name]["kernel"].T, told[f"grad/param/{name}.weight"])
    if lookahead:
        for row in range(len(h_BLD)):
            skipped = 1 + int(own.boundary_mask_BL[row, 1])  # chunks that end at position 0
            wanted_MD = found["pool/out_BMD"][row, 1:]
            mine_MD = chunks_BMD[row, skipped : skipped + len(wanted_MD)]
            used = min(int(told["mask_BL"][row].sum()) - 1, len(wanted_MD))
            assert np.array_equal(mine_MD[:used], wanted_MD[:used])
        mask_BL = told["mask_BL"]
        stage = nnx.merge(graph, params)
        told_mask = own._replace(boundary_mask_BL=mask_BL, boundary_prob_BL=mask_BL + np.float32(0))
        slots = open_slots(told_mask, context, found["depool/y_BMD"].shape[1])
        read = lambda y_BMD: stage.dechunk_layer(y_BMD, told_mask, slots, chunking.dechunk)
        read_BLD, pull = jax.vjp(read, jnp.asarray(found["depool/y_BMD"]))
        agree(read_BLD + found["depool/byte_embeds_BLD"], found["depool/out_BLD"])
        gradients_agree(pull(found["depool/cot_BLD"])[0], found["depool/grad_y_BMD"])


def test_labels_of_a_late_predictor_are_those_of_the_position_before():
    p_BL = np.float32([[0.9, 0.2, 0.7, 0.1, 0.8, 0.3]])
    labels_BL = np.array([[True, False, True, True, False, True]])
    context = Context(np.int32([[1, 1, 1, 2, 2, 2]]))
    own = decide(Prediction(prob=p_BL), context, 6)
    (settings,) = chunking_of("bolmo").losses
    shifted_BL = np.array([[False, True, False, False, True, False]])
    values = [
        loss_sum(chunking_of("bolmo", losses=(replace(settings, late=late),)), own, None, labels)
        for late, labels in ((True, labels_BL), (False, shifted_BL))
    ]
    assert values[0] == values[1] and values[0] > 0


# --- Zonkey, RL tokenisation, SOMBRERO ----------------------------------------------------------


def test_zonkey_probability_of_long_chunks():
    """Its code leaves out the first and the last position, but counts windows with the last."""
    found = load("family/zonkey_splitter")
    longest = int(found["in/max_len_min_len"][0])
    n_B = found["in/is_real_BL"].sum(1).astype(int)
    index_L = np.arange(found["in/p_BL"].shape[1])[None]
    ids_BL = ((index_L > 0) & (index_L < n_B[:, None] - 1)).astype(np.int32)

    def loss(p_BL):
        return sum(
            jnp.sum(no_start(p_BL, ids_BL, width)) / float(np.sum(n_B - width))
            for width in range(longest, longest + 3)
        )

    value, grad = loss_and_gradient(loss, found["in/p_BL"])
    agree(value, found["out/patch_loss"])
    gradients_agree(grad, found["grad_patch_loss/p_BL"])


def test_zonkey_probability_of_short_chunks():
    """Its code knows that position 0 starts a chunk, and divides by the sum of p over windows."""
    found = load("family/zonkey_splitter")
    shortest = int(found["in/max_len_min_len"][1])
    ids_BL = found["in/is_real_BL"].astype(np.int32)

    def loss(p_BL):
        p_BL = jnp.where(np.arange(p_BL.shape[1]) == 0, 1.0, p_BL)
        parts = (too_short(p_BL, ids_BL, max(shortest - less, 1)) for less in (1, 2, 3))
        return sum(jnp.sum(short_BL) / jnp.sum(start_BL) for short_BL, start_BL in parts)

    value, grad = loss_and_gradient(loss, found["in/p_BL"])
    agree(value, found["out/short_loss"])
    gradients_agree(grad, found["grad_short_loss/p_BL"])


IDS = np.int32([[1, 1, 1, 1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1]])


def drawn_rows(seed, *, has_null_chunk=False):
    """(boundaries with random p, next-byte nats) of two rows."""
    rng = np.random.default_rng(seed)
    logit_BL = rng.normal(size=IDS.shape).astype(np.float32)
    own = decide(Prediction(logit_BL), Context(IDS), 99, has_null_chunk=has_null_chunk)
    nll_BL = rng.uniform(0.1, 3, IDS.shape).astype(np.float32)
    extra_BL = rng.uniform(0.1, 3, IDS.shape).astype(np.float32)
    return own._replace(extra=np.where(IDS > 0, extra_BL, 0)), nll_BL


def loss_of(settings, own, nll_BL, ratio=4.0):
    counts = rate_counts(own, 1)
    x = LossInputs(own, settings, np.float32([ratio]), False, counts, counts, nll_BL)
    return float(settings.part()(x))


def test_losses_without_public_code_equal_loops():
    own, nll_BL = drawn_rows(1)
    p_BL, wanted_BL = np.asarray(own.boundary_prob_BL), np.asarray(own.boundary_ste_BL) > 0.5
    logit_BL, early_BL, valid = np.asarray(own.boundary_logit_BL), own.extra, IDS != 0
    same = [[t + 1 < 9 and IDS[b, t] == IDS[b, t + 1] != 0 for t in range(9)] for b in range(2)]
    first = [[t == 0 or IDS[b, t] != IDS[b, t - 1] for t in range(9)] for b in range(2)]
    places = [(b, t) for b in range(2) for t in range(9) if valid[b, t]]

    cab = sum((1 - np.exp(-nll_BL[b, t + 1]) - p_BL[b, t]) ** 2 for b, t in places if same[b][t])
    np.testing.assert_allclose(loss_of(CAB.Config(), own, nll_BL), cab / len(places), rtol=1e-5)

    settings = Hazard.Config(longest=3, shortest=3, long=2.0, short=5.0)
    sure_BL = 1 / (1 + np.exp(-logit_BL))
    total = 0.0
    for b, t in places:
        for width in (3, 4, 5):
            if t + width <= 9 and len(set(IDS[b, t : t + width])) == 1:
                total += 2 * np.prod(1 - sure_BL[b, t : t + width])
        for more in (2, 1, 1):
            if t + more < 9 and len(set(IDS[b, t : t + more + 1])) == 1:
                total += 5 * sure_BL[b, t] * (1 - np.prod(1 - sure_BL[b, t + 1 : t + 1 + more]))
    np.testing.assert_allclose(loss_of(settings, own, nll_BL), total / len(places), rtol=1e-5)

    settings = PolicyGradient.Config(discount=0.9, head=3.0, rate=2.0)
    returns_BL = np.zeros(IDS.shape)
    for b, t in reversed(places):
        if same[b][t]:
            reward = early_BL[b, t + 1] - nll_BL[b, t + 1]
            returns_BL[b, t] = reward + 0.9 * returns_BL[b, t + 1]
    mean_B = [returns_BL[b][valid[b]].mean() for b in range(2)]
    total = 0.0
    for b, t in places:
        if not first[b][t]:
            p = sure_BL[b, t] if wanted_BL[b, t] else 1 - sure_BL[b, t]
            total -= np.log(p) * (returns_BL[b, t] - mean_B[b])
    rate = wanted_BL[valid].mean()
    expected = total / len(places) + 3 * early_BL[valid].mean()
    expected += 2 * logit_BL[valid].mean() * (rate - 1 / 4)
    np.testing.assert_allclose(loss_of(settings, own, nll_BL), expected, rtol=1e-5)


def test_policy_head_scores_the_byte_after_its_state():
    chunking = chunking_of("rl_tokenisation")
    graph, params = chunking_stage(chunking, 6)
    rng = np.random.default_rng(2)
    h_BLD = rng.normal(size=(*IDS.shape, 6)).astype(np.float32)
    ids_BL = rng.integers(0, 256, IDS.shape).astype(np.int32)
    own = quick_jit(lambda: nnx.merge(graph, params).boundaries(
        h_BLD, Context(IDS, bytes_BL=ids_BL), 99, key=KEY))()  # fmt: skip
    logits_BLV = h_BLD @ np.asarray(params["routing_module"]["head"]["kernel"])
    for b, t in ((0, 1), (0, 4), (0, 6), (1, 8)):
        logits_V = logits_BLV[b, t - 1].astype(np.float64)
        nll = np.log(np.exp(logits_V).sum()) - logits_V[ids_BL[b, t]]
        np.testing.assert_allclose(own.extra[b, t], nll, rtol=1e-4)
    assert own.extra[0, 0] == own.extra[0, 5] == 0
