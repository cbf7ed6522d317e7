"""Streaming equals the forward pass: every network, rows with different starts and boundaries.

T2 of the battery. The reference is always one forward pass over the whole rows.
"""

import json
import math
import re
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.configs import default, mixed_scripts_routed, mixed_scripts_single, reference, tiny
from experiments.configs.systems import SYSTEMS
from hnet.chunking.predictors.mlp import MLP
from hnet.config import PUBLISHED, HNetConfig, SSMConfig
from hnet.decode import stream
from hnet.errors import ConfigError
from hnet.fields import to_json
from hnet.interop import from_official
from hnet.layout import layout_height
from hnet.nn import active_rows
from hnet.nn import cache as nn_cache
from tests import golden_data
from tests.networks import (
    COMPUTE,
    MLP_END,
    NETWORKS,
    network,
    optimized_jit,
    quick_jit,
    random_params,
    stage,
)

B, L = 64, 23  # rows, bytes per row
TEXT = np.frombuffer(b"aZ9  ..,\n\x80\xc3", np.uint8)  # letters and spacelike bytes, some invalid

GIVEN = network(stage("t1 t1", 26, predictor="external", alignment="end"), stage("t1", 26))
MIXED = network(  # START inside END, and rules on bytes and on positions
    stage("t1 t1", 26, predictor="whitespace", alignment="end", pool="mean"),
    stage("m1 t1", 26, predictor="fixed", dechunk="repeat"),
    stage("t1", 39),
)


def shrunk(config: HNetConfig) -> HNetConfig:
    """The same layouts, chunking and windows at widths of 26, 39 and 52."""
    widths = sorted({part.d_model for part in config.stages})
    stages = []
    for part in config.stages:
        width = 26 + 13 * widths.index(part.d_model)
        narrow = {"d_model": width, "num_heads": width // 13, "rotary_emb_dim": 6}
        window = min(part.window_size, 5)  # -1 sees everything
        stages.append(replace(part, **narrow, d_intermediate=61, window_size=window))
    ssm = SSMConfig(d_state=7, head_dim=13)
    return replace(config, stages=tuple(stages), ssm=ssm, compute=COMPUTE)


RULES_OF_TEXT = {"spacelike", "whitespace", "words"}
UNSEEN = (
    "target_ratio",
    "losses",
    "route_target_ratios",
    "overflow",
)  # chunking fields used in training only


def repository() -> dict[str, HNetConfig]:
    """Every named configuration, shrunk. Configurations that differ only in training settings or in
    the depth of the main network are represented by the deepest one, under all their names."""
    named = PUBLISHED | {system.__name__: system() for system in SYSTEMS}
    for module in (default, reference, tiny, mixed_scripts_single, mixed_scripts_routed):
        named[module.__name__.split(".")[-1]] = module.config().model
    alike: dict[str, list[tuple[int, str]]] = {}
    for name, config in named.items():
        parts = [to_json(part) for part in shrunk(config).stages]
        depth = layout_height(config.stages[-1].arch_layout[0])
        parts[-1]["arch_layout"] = config.stages[-1].arch_layout[0].rstrip("0123456789")
        for part in parts:
            fixed = part["chunking"]["predictor"]["name"] == "fixed"
            for field in UNSEEN[fixed:]:
                part["chunking"].pop(field)
        alike.setdefault(repr((parts, config.route_groups)), []).append((depth, name))
    return {
        " ".join(name for _, name in group): shrunk(named[max(group)[1]])
        for group in alike.values()
    }


REPOSITORY = repository()
ALL = {**NETWORKS, "given": GIVEN, "mixed": MIXED, **REPOSITORY}


def scaled_by_depth(config: HNetConfig, params: dict) -> dict:
    """Parameters whose contributions to the residual stream are scaled down as at initialisation.

    Otherwise float32 is the limit: with gains of 1 in 38 layers (2stage_XL_code), steps and forward
    pass are each 5e-5 from the logits in float64, where the two agree.
    """
    height = sum(layout_height(part) for s in config.stages for part in s.arch_layout)

    def scale(path, leaf):
        names = [str(getattr(part, "key", part)) for part in path]
        is_output = "layers" in names and names[-2] in ("out_proj", "fc2")
        return leaf / math.sqrt(height) if is_output else leaf

    return jax.tree_util.tree_map_with_path(scale, params)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(nn_cache, "KV_BLOCK", 4)  # so that a row's keys fill several blocks


def draw(config, seed=0):
    """Bytes, and the network's other inputs."""
    rng = np.random.default_rng(seed)
    rules = {s.chunking.predictor.name for s in config.stages[:-1]} & RULES_OF_TEXT
    ids_BL = rng.choice(TEXT if rules else np.arange(256), (B, L)).astype(np.int32)
    extra = {}
    if config.num_routes > 1:
        extra["route_ids_BL"] = rng.integers(0, config.num_routes, (B, L)).astype(np.int32)
    if config.num_chunked and config.stages[0].chunking.predictor.name == "external":
        extra["boundaries_BL"] = rng.random((B, L)) < 0.3
    return ids_BL, extra


def forward(graph, params, ids_BL, extra, capacities=None):
    @quick_jit
    def run(params):
        logits_BLV, routes = nnx.merge(graph, params)(ids_BL, capacities=capacities, **extra)
        return logits_BLV, [r.boundary_mask_BL for r in routes]

    return jax.device_get(run(params))


@cache
def answers(name):
    """Expected logits and boundaries of the whole batch, and {wait_share: results of streaming}."""
    config = ALL[name]
    graph, params = random_params(config, SEEDS.get(name, 3))
    if name in REPOSITORY:
        params = scaled_by_depth(config, params)
    ids_BL, extra = draw(config)
    expected, masks = forward(graph, params, ids_BL, extra)
    fractions = (0.3,) if name == "routed" else ()
    lens = stream.full_lens(config, L)
    found = streamed(graph, params, ids_BL, extra, LENGTHS, lens, fractions)
    return expected, stream.boundaries_at_bytes(config, masks, ids_BL.shape), found


def streamed(graph, params, ids_BL, extra, lengths_B, max_lens, fractions=(), wait_shares=(0, 0.6)):
    """Prefill each row with its own length, then feed the rest byte by byte.

    Returns, for each wait_share, logits (B, L, V) and boundaries (B, L, S), with NaN and -1 at
    bytes before a row's last prompt byte, the logits after the prompt, and the number of ticks.
    """
    rows = np.arange(len(ids_BL))

    @quick_jit
    def run(params, wait_share):
        model = nnx.merge(graph, params)
        logits_BV, _, cache = stream.prefill(model, ids_BL, lengths_B, max_lens, **extra)

        def one(carry, _):
            cache, position_B, waits_B = carry
            at = (rows, jnp.minimum(position_B, L - 1))
            given = {name: jnp.asarray(a)[at] for name, a in extra.items()}
            active_B = (position_B < L) & ~waits_B
            logits_BV, boundaries, done_B, cache = stream.advance(
                model, cache, jnp.asarray(ids_BL)[at], active_B,
                route_ids_B=given.get("route_ids_BL"), boundary_B=given.get("boundaries_BL"),
                fractions=fractions, wait_share=wait_share,
            )  # fmt: skip
            got = (logits_BV, boundaries.mask_BS, jnp.where(done_B, position_B, L))
            position_B = position_B + done_B.astype(jnp.int32)
            return (cache, position_B, (active_B | waits_B) & ~done_B), got

        start = (cache, jnp.asarray(lengths_B), jnp.zeros(len(rows), bool))
        _, steps = jax.lax.scan(one, start, length=4 * L)
        return logits_BV, steps

    found = {}
    for wait_share in wait_shares:
        prompt_logits, steps = jax.device_get(run(params, jnp.float32(wait_share)))
        logits_TBV, mask_TBS, position_TB = steps
        logits_BLV = np.full((*ids_BL.shape, prompt_logits.shape[-1]), np.nan, np.float32)
        mask_BLS = np.full((*ids_BL.shape, mask_TBS.shape[-1]), -1)
        logits_BLV[rows, lengths_B - 1] = prompt_logits  # if empty, overwritten below
        for t, b in np.argwhere(position_TB < L):
            logits_BLV[b, position_TB[t, b]] = logits_TBV[t, b]
            mask_BLS[b, position_TB[t, b]] = mask_TBS[t, b]
        ticks = 1 + np.max(np.flatnonzero(np.any(position_TB < L, axis=1)))
        found[wait_share] = logits_BLV, mask_BLS, prompt_logits, ticks
    return found


LENGTHS = np.random.default_rng(3).permutation([*range(L + 1), *[0, 1] * 9, *[5, 6] * 11])
LENGTHS = LENGTHS.astype(np.int32)


# Seeds of parameters with boundaries at about half of the bytes, so that rows wait for each other.
SEEDS = {"mixed_scripts_single": 4, "hnet": 7}

# tests/parts compares the stream of every part but levels, tests/nn/test_mixers.py that of layers
FEW = ["one_stage", "routed", "levels"]


@pytest.mark.few("name", FEW, [*ALL])
def test_steps_equal_the_forward_pass(name):
    expected, bytes_BLS, found = answers(name)
    seen, fed = np.arange(L) >= LENGTHS[:, None] - 1, np.arange(L) >= LENGTHS[:, None]
    for logits, mask_BLS, prompt_logits, _ in found.values():
        np.testing.assert_array_equal(np.isnan(logits[..., 0]), ~seen)
        np.testing.assert_allclose(logits[seen], expected[seen], rtol=0, atol=1e-5)
        np.testing.assert_array_equal(prompt_logits[LENGTHS == 0], 0)
        np.testing.assert_array_equal(mask_BLS[fed], bytes_BLS[fed])
    ticks = {wait_share: answer[-1] for wait_share, answer in found.items()}
    assert ticks[0] == L  # no row waits
    assert ticks[0.6] > L or not ALL[name].num_chunked
    routers = np.array([s.chunking.predictor.name for s in ALL[name].stages[:-1]], str)
    if name != "mixed":  # the test needs boundaries at different times
        assert np.all(np.any(bytes_BLS != bytes_BLS[:1], axis=(0, 1)) | (routers == "fixed"))


CLIPPED = network(  # START inside END
    stage("t1 t1", 26, **MLP_END, dechunk="repeat", residual="add"), stage("t1 t1", 26),
    stage("t1", 26),
)  # fmt: skip


@pytest.mark.few("name", ["CLIPPED"], ["CLIPPED", "one_stage", "pooled_ends"])
def test_room_clips_as_a_capacity_does(name):
    config = NETWORKS.get(name, CLIPPED)
    slots = (9, 3) if name == "CLIPPED" else (4,)
    graph, params = random_params(config)
    ids_BL, extra = draw(config, 1)
    expected, _ = forward(graph, params, ids_BL, extra, slots)
    free, masks = forward(graph, params, ids_BL, extra)
    found = streamed(graph, params, ids_BL, extra, LENGTHS, (L, *slots), wait_shares=(0.6,))
    seen = np.arange(L) >= LENGTHS[:, None] - 1
    assert np.abs(free - expected).max() > 1e-2  # some boundaries are clipped
    assert all(np.sum(m, axis=1).max() > most for m, most in zip(masks, slots))
    for logits, *_ in found.values():
        np.testing.assert_allclose(logits[seen], expected[seen], rtol=0, atol=1e-5)


def test_a_row_does_not_depend_on_its_neighbours():
    graph, params = random_params(NETWORKS["one_stage"])
    ids_BL, extra = draw(NETWORKS["one_stage"])
    _, _, together = answers("one_stage")
    one = slice(17, 18)
    separate = streamed(graph, params, ids_BL[one], extra, LENGTHS[one], (L, L), wait_shares=(0,))[
        0
    ][0]
    for logits, *_ in together.values():
        # one row has other shapes than 64 rows, with different rounding
        np.testing.assert_allclose(separate[0], logits[17], rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 7, 16])
def test_only_active_rows_run_and_in_the_smallest_batch(batch):
    """Every number of active rows against a plain loop; the function returns how many it ran on."""
    rng = np.random.default_rng(0)
    sizes = active_rows.sizes(batch, active_rows.FRACTIONS)
    assert sizes[-1] == batch and sizes == sorted(set(sizes))

    def double(inputs_R, state_B, rows):
        ran_on = jnp.full(len(inputs_R), len(rows.index_R), jnp.int32)
        state_B = state_B.at[rows.index_R].add(inputs_R[:, 0], mode="drop")
        return (2 * inputs_R, ran_on), state_B

    @partial(quick_jit, donate_argnums=2)
    def run(active_B, inputs_B, state_B):
        return active_rows.run_on_active_rows(
            double, active_B, inputs_B, state_B, active_rows.FRACTIONS
        )

    for count in range(batch + 1):
        active_B = rng.permutation(batch) < count
        inputs_B, state_B = rng.normal(size=(batch, 3)), rng.normal(size=batch)
        inputs_B, state_B = np.float32(inputs_B), np.float32(state_B)
        (out_B, ran_on_B), new_B = run(active_B, inputs_B, jnp.asarray(state_B))
        np.testing.assert_array_equal(out_B, np.where(active_B[:, None], 2 * inputs_B, 0))
        np.testing.assert_array_equal(new_B, np.where(active_B, state_B + inputs_B[:, 0], state_B))
        smallest = next((s for s in sizes if s >= count), 0) if count else 0
        np.testing.assert_array_equal(ran_on_B, np.where(active_B, smallest, 0))


def test_a_step_copies_no_cache(monkeypatch):
    """The compiled step moves rows, never a whole cache array, and reuses its donated input."""
    monkeypatch.setattr(nn_cache, "KV_BLOCK", 64)
    config = network(stage("t1 m1", 26, window=100), stage("T2", 39))
    graph, params = random_params(config)
    batch, length = 16, 512

    def run(params, cache, byte_B):
        return stream.step(nnx.merge(graph, params), cache, byte_B, fractions=(0.25,))

    empty = jnp.zeros((batch, 1), jnp.int32), jnp.zeros(batch, jnp.int32)
    prefill = lambda params: stream.prefill(
        nnx.merge(graph, params), *empty, stream.full_lens(config, length)
    )
    _, _, cache = jax.eval_shape(prefill, params)
    byte_B = jax.ShapeDtypeStruct((batch,), jnp.int32)
    compiled = optimized_jit(run, donate_argnums=1).lower(params, cache, byte_B).compile()
    keys = jax.tree.leaves(cache.stage.inner.stacks)[0]
    assert keys.size == 2 * batch * length * 39
    copied = re.findall(r"= f32\[([\d,]+)\]\S* copy\(", compiled.as_text())
    sizes = [np.prod([int(n) for n in shape.split(",")]) for shape in copied]
    assert max(sizes) < keys.size / 2
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    assert compiled.memory_analysis().alias_size_in_bytes >= 0.9 * total


def test_noisy_routers_are_refused():
    noisy = {"predictor": MLP.Config(reference_noise_at_evaluation=True)}
    config = network(stage("t1 t1", 26, **noisy), stage("t1", 26))
    graph, params = random_params(config)
    with pytest.raises(ConfigError, match="reference_noise_at_evaluation=True"):
        stream.prefill(
            nnx.merge(graph, params), jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32), (1, 1)
        )


def test_decoding_equals_the_official_one():
    """One row of the official model: teacher-forced steps, then greedy decoding after a prompt."""
    official = golden_data.load("a_1stage_m2_T2")
    config = json.loads(str(official["config"]))
    graph, params = nnx.split(from_official(config, golden_data.part(official, "param")))
    lens = (64, 64)

    @quick_jit
    def prefill(params, ids_BL, lengths_B):
        return stream.prefill(nnx.merge(graph, params), ids_BL, lengths_B, lens)

    @partial(quick_jit, donate_argnums=1)
    def step(params, cache, byte_B):
        return stream.step(nnx.merge(graph, params), cache, byte_B)

    ids = official["step/input_ids"]
    _, _, cache = prefill(params, ids[:, :24], np.zeros(1, np.int32))
    for t in range(ids.shape[1]):
        logits, boundaries, cache = step(params, cache, ids[:, t])
        expected = official["step/logits"][0, t]
        np.testing.assert_allclose(logits[0, ::11], expected, rtol=0, atol=2e-5)
        p = official["step/boundary_prob"][t]
        np.testing.assert_allclose(boundaries.prob_BS[0, 0], p, rtol=0, atol=3e-6)

    prompt, tokens = official["greedy/prompt"], official["greedy/tokens"][0]
    logits, _, cache = prefill(params, prompt, np.array([prompt.shape[1]], np.int32))
    for token, expected in zip(tokens, official["greedy/logits"][0]):
        np.testing.assert_allclose(logits[0, ::11], expected, rtol=0, atol=2e-5)
        assert int(jnp.argmax(logits[0])) == token
        logits, _, cache = step(params, cache, np.array([token], np.int32))
