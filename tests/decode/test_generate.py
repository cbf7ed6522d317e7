"""Whole generations: single rows and batches, stops, streams, against the model's own forward."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from hnet.config import BOS_ID, EOS_ID, HNetConfig, StageConfig
from hnet.data.scripts import route_table, script_ids
from hnet.decode import stream
from hnet.decode.apart import can_be_apart, model_apart
from hnet.decode.decoder import Decoder, _run
from hnet.decode.generate import _Row, chunk_starts, generate, stream_text
from hnet.decode.sampling import Controls, Sampling
from hnet.decode.score import logprobs
from hnet.errors import ConfigError
from hnet.inspect.segmentation import Segmentation
from hnet.model import HNetLM, split
from tests.networks import NETWORKS, OPTIMIZED, network, random_params, stage

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Routed, so that the script of the text so far matters; one shape of batch, so few compilations.
CONFIG = network(
    stage("t1 t1", 26, routes=2, window=9), stage("t1", 26), route_groups=(("Latin",),)
)
PROMPTS = ["", "a", "Привет, мир! and more", b"\xff\x80broken\xe2\x82", "日本語 text 12 🙂 שלום"]
ROWS = 3
WARM = Sampling(max_bytes=24, temperature=1.5, seed=11)


@pytest.fixture(scope="module")
def model() -> HNetLM:
    graph, params = random_params(CONFIG)
    return nnx.merge(graph, params)


@pytest.fixture(scope="module")
def results(model):
    return generate(model, PROMPTS, WARM, batch_size=ROWS)


def test_a_result_depends_only_on_its_prompt_and_seed(model, results):
    order = [4, 2, 0, 3, 1]
    others = generate(
        model, [PROMPTS[i] for i in order], WARM, seeds=[11 + i for i in order], batch_size=ROWS
    )
    for i, other in zip(order, others):
        assert other.data == results[i].data and other.prompt == results[i].prompt
    elsewise = generate(model, PROMPTS[:ROWS], WARM, seeds=[5, 5, 5], batch_size=ROWS)
    assert all(a.data != b.data for a, b in zip(elsewise, results))


def test_log_probabilities_and_boundaries_are_those_of_the_forward_pass(model, results):
    route_of = route_table(CONFIG.route_groups)
    graph, params = nnx.split(model)

    @jax.jit
    def forward(params, ids_BL, route_ids_BL):
        _, routes = nnx.merge(graph, params)(ids_BL, route_ids_BL=route_ids_BL)
        return [r.boundary_mask_BL for r in routes]

    scores = logprobs(model, [r.prompt + r.data for r in results], batch_size=5)
    for result, score in zip(results, scores):
        data = bytes([BOS_ID]) + result.prompt + result.data
        assert result.finish_reason == "length" and len(result.data) == WARM.max_bytes
        np.testing.assert_allclose(
            result.logprobs, score.logprobs[len(result.prompt) :], rtol=0, atol=2e-5
        )
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(data)] = list(data)
        ids = route_of[script_ids(padded[0].astype(np.uint8).tobytes())[0]][None]
        masks = forward(params, padded, ids)
        expected = stream.boundaries_at_bytes(CONFIG, masks, padded.shape)[0, 1 : len(data)]
        np.testing.assert_array_equal(result.boundaries, expected)


def test_streamed_pieces_make_up_the_text(model, results):
    shown, finished = dict.fromkeys(range(len(PROMPTS)), ""), {}
    for piece in stream_text(model, PROMPTS, WARM, batch_size=ROWS):
        assert piece.index not in finished
        shown[piece.index] += piece.text
        if piece.finished:
            finished[piece.index] = piece.finished
    for i, result in enumerate(results):
        assert shown[i] == result.text and finished[i].data == result.data


def test_the_constraint_gives_valid_text(model):
    hot = Sampling(max_bytes=24, temperature=6.0, valid_utf8=True)
    for result in generate(model, PROMPTS[:3], hot, batch_size=ROWS):
        assert 0 < len(result.data) <= 24
        assert result.data.decode()  # strictly
    broken = generate(model, [PROMPTS[3]] * 3, hot, batch_size=ROWS)
    for result in broken:  # the prompt ends within a character, which comes first
        (b"\xe2\x82" + result.data).decode()


def test_without_bos_an_empty_prompt_starts_from_all_bytes_alike(model):
    first, second, _ = generate(model, ["", "", "x"], WARM, bos=False, batch_size=ROWS)
    for result in (first, second):
        assert result.logprobs[0] == pytest.approx(np.log(1 / 256), abs=1e-5)
    assert first.data != second.data


def test_bad_calls_are_refused_in_one_line(model):
    with pytest.raises(ConfigError, match="2 seeds for 1 prompts"):
        generate(model, ["a"], WARM, seeds=[1, 2])
    with pytest.raises(ConfigError, match="batch_size=0"):
        generate(model, ["a"], WARM, batch_size=0)
    with pytest.raises(ConfigError, match="no text"):
        generate(model, ["\ud800"], WARM)
    assert generate(model, [], WARM) == []
    given_cuts = network(stage("t1 t1", 26, predictor="external"), stage("t1", 26))
    with pytest.raises(ConfigError, match="predictor='external'"):
        generate(nnx.merge(*random_params(given_cuts)), ["a"], WARM)


# --- the end of a text, without a model -------------------------------------------------------

LETTERS = st.lists(st.sampled_from([97, 98, 99, 0xC3, 0xA9, EOS_ID]), max_size=20)
STOPS = st.lists(st.text("abcé", min_size=1, max_size=3), max_size=3).map(tuple)


@settings(max_examples=300)
@given(LETTERS, STOPS, st.integers(1, 20), st.lists(st.integers(1, 7), min_size=20, max_size=20))
def test_a_text_ends_before_stop_strings_and_eos_however_it_comes(data, stops, longest, blocks):
    row = _Row(b"p", np.zeros((1, 2), bool), Sampling(max_bytes=longest, stop=stops))
    end, reason = len(data), None
    for n in range(1, len(data) + 1):  # by hand: the first byte at which the text ends
        found = [s for s in stops if bytes(data[:n]).endswith(s.encode())]
        if data[n - 1] == EOS_ID or found or n == longest:
            end = n - (1 if data[n - 1] == EOS_ID else len(found[0].encode()) if found else 0)
            reason = "eos" if data[n - 1] == EOS_ID else "stop" if found else "length"
            break
    shown, done = "", 0
    for block in blocks:
        part = np.array(data[done : done + block], np.int64)
        done += block
        if row.finish_reason is None and len(part):
            shown += row.add(part, np.arange(len(part)), np.zeros((len(part), 2), bool))
            assert bytes(data[:end]).decode("utf-8", "replace").startswith(shown) or not reason
    assert row.finish_reason == reason
    if reason:
        result = row.result()
        assert result.data == bytes(data[:end]) and result.text == shown
        assert len(result.logprobs) == end and result.boundaries.shape == (1 + end, 2)


# --- boundaries as offsets --------------------------------------------------------------------


@given(st.integers(0, 12), st.integers(0, 10**6), st.sampled_from(["start", "end"]))
def test_chunk_starts_are_those_of_the_router_arrays(length, seed, alignment):
    rng = np.random.default_rng(seed)
    at_end = {"predictor": "mlp", "alignment": "end"} if alignment == "end" else {}
    config = network(stage("t1 t1", 26, **at_end), stage("t1 t1", 26, **at_end), stage("t1", 26))
    boundaries = np.zeros((length, 2), bool)
    boundaries[:, 0] = rng.random(length) < 0.6
    boundaries[:1, 0] |= alignment == "start"
    boundaries[:, 1] = boundaries[:, 0] & (rng.random(length) < 0.6)
    boundaries[:1, 1] |= alignment == "start"
    inner = boundaries[boundaries[:, 0], 1]
    outputs = [(mask, mask.astype(float)) for mask in (boundaries[:, 0], inner)]
    expected = Segmentation.from_router(
        bytes(length), [(np.append(m, False), np.append(p, 0.0)) for m, p in outputs],
        alignment=alignment,
    )  # fmt: skip
    found = chunk_starts(config, boundaries)
    if length:
        assert [tuple(starts) for starts in found] == [s.starts for s in expected.stages]
    else:
        assert found == [[], []] or found == [[0], [0]]


def test_a_network_that_does_not_cut_has_no_boundaries():
    model = nnx.merge(*random_params(NETWORKS["iso"]))
    (result,) = generate(model, ["ab"], Sampling(max_bytes=3, temperature=0))
    assert result.boundaries.shape == (2 + len(result.data), 0)
    assert chunk_starts(model.config, result.boundaries) == []


def test_another_number_of_bytes_compiles_nothing(model, results):
    """Nor does a shorter prompt; `results` ran the same shape of batch."""
    before = _run._cache_size()
    for max_bytes in (1, 7, 40):
        found = generate(model, ["", "a", "b"], replace(WARM, max_bytes=max_bytes), batch_size=ROWS)
        size = min(max_bytes, len(results[1].data))
        assert found[1].data[:size] == results[1].data[:size] and len(found[1].data) >= size
    assert _run._cache_size() == before


def test_layers_apart_give_the_same_bytes():
    model = nnx.merge(*random_params(network(stage("m2 -", 26), stage("t2", 26, window=5))))
    sampling, found = Sampling(max_bytes=12, temperature=1.5, eos=False), []
    for layers_apart in (False, True):
        decoder = Decoder(model, layers_apart=layers_apart)
        state, _ = decoder.start([b"one", b"", b"another prompt"], sampling)
        seed_B = jnp.arange(3, dtype=jnp.uint32)
        _, outputs = decoder.run(state, Controls.of(sampling), seed_B, 24)
        found.append(jax.device_get(outputs))
    stacked, apart = found
    assert stacked.given_TB.sum() == 3 * 12 and stacked.boundaries_TBS.any()
    np.testing.assert_array_equal(apart.byte_TB, stacked.byte_TB)
    np.testing.assert_array_equal(apart.boundaries_TBS, stacked.boundaries_TBS)
    np.testing.assert_allclose(apart.logprob_TB, stacked.logprob_TB, rtol=0, atol=1e-5)


def test_steps_on_layers_apart_copy_no_recurrent_state():
    """XLA overwrites a state in place only if one operation reads it; otherwise it copies all."""
    model = nnx.merge(*random_params(network(stage("m1 m1", 26), stage("T1", 39))))
    decoder = Decoder(model, layers_apart=True)
    state, _ = decoder.start([b"ab"], WARM)
    shape = state.cache.stage.stacks["encoder"][0].state.shape
    assert len(shape) == 4  # no layer axis
    compiled = _run.lower(
        decoder.params, state, Controls.of(WARM), jnp.zeros(1, jnp.uint32),
        jnp.asarray(decoder.route_of), jnp.float32(0), jnp.int32(2), static=decoder.static,
        most_ticks=2,
    ).compile(compiler_options=OPTIMIZED)  # fmt: skip
    copied = re.findall(r"= f32\[([\d,]+)\]\S* copy\(", compiled.as_text())
    assert copied and ",".join(map(str, shape)) not in copied


def test_layers_apart_are_views_of_the_weights():
    """Every layer's array lies inside of the stacked one; biases and norms may be too small."""
    outer = StageConfig(("m2", "m2"), 64, num_heads=4, rotary_emb_dim=8)
    config = HNetConfig((outer, replace(outer, arch_layout=("T3",), d_intermediate=64)))
    model = nnx.merge(*random_params(config))
    assert can_be_apart(split(model)[1])

    def pieces(model):
        large = [a for a in jax.tree.leaves(split(model)[1]) if a.ndim == 3 and a[0].size >= 64]
        return [(a.unsafe_buffer_pointer(), a.nbytes) for a in large]

    whole, layers = pieces(model), pieces(model_apart(model))
    assert len(layers) > 2 * len(whole) - 3
    for at, size in layers:
        assert any(first <= at and at + size <= first + most for first, most in whole)
    assert sum(size for _, size in layers) == sum(size for _, size in whole)


def test_a_loaded_model_compiles_a_block_of_steps_once(model):
    """Parameters that `load` gives are committed to a device, unlike those made by `jax.jit`."""
    graph, params = nnx.split(model)
    loaded = nnx.merge(graph, jax.device_put(params, jax.devices()[0]))
    assert jax.tree.leaves(nnx.split(loaded)[1])[0].committed
    before = _run._cache_size()
    found = generate(loaded, PROMPTS[:ROWS], WARM, batch_size=ROWS)  # several blocks
    assert _run._cache_size() == before + 1
    assert [one.data for one in found] == [
        one.data for one in generate(model, PROMPTS[:ROWS], WARM, batch_size=ROWS)
    ]
