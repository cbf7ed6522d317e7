"""BLT: patches from entropies, against its own code; a second model that is a run of ours."""

import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.entropy_threshold import ThresholdConfig, threshold
from hnet.chunking.boundaries import Prediction, decide
from hnet.chunking.part import Place, Positions
from hnet.chunking.predictors.rules import Fixed, spacelike
from hnet.config import ChunkingConfig, HNetConfig, StageConfig
from hnet.decode import stream
from hnet.errors import ConfigError
from hnet.fields import from_json, to_json
from hnet.interop.load import load
from hnet.model import split
from hnet.nn.context import Context
from hnet.second_model.entropy import Entropy, end_logit, entropy
from hnet.train.workdir import read_config
from tests.chunking_pieces import chunked, decided
from tests.golden_data import relative_error
from tests.networks import quick_jit
from tests.training import ATTENTION, run, tiny_run

GOLDEN = Path(__file__).parents[1] / "golden" / "family"
PATCHES = np.load(GOLDEN / "blt_patching_hash.npz")
PIECES = np.load(GOLDEN / "blt_pieces.npz")


def ends(lengths_BM: np.ndarray, L: int) -> np.ndarray:
    """Last position of each patch, bool (B, L); a patch that goes on after L has none."""
    found = np.zeros((len(lengths_BM), L + 1), bool)
    for row, lengths in zip(found, lengths_BM):
        row[np.cumsum(lengths[lengths > 0]) - 1] = True
    return found[:, :L]


# name -> (settings, longest patch). The thresholds are inside the intervals that give the lengths.
RULES = {
    "global": (Entropy.Config(theta=0.87), 0),
    "global_next": (Entropy.Config(theta=0.87), 0),
    "monotonic": (Entropy.Config(rule="monotonic", increase=0.2985), 0),
    "global_and_monotonic": (Entropy.Config(rule="both", theta=0.5, increase=0.225), 0),
    "global_max_length": (Entropy.Config(theta=0.87), 4),
}


@pytest.mark.parametrize("name", RULES)
def test_patches_are_those_of_blt(name):
    config, longest = RULES[name]
    entropy_BL = jnp.asarray(PATCHES["entropies_BL"])
    index_BL = jnp.broadcast_to(jnp.arange(40, dtype=jnp.int32)[None], entropy_BL.shape)
    before_BL = jnp.pad(entropy_BL[:, :-1], ((0, 0), (1, 0)))
    logit_BL = end_logit(entropy_BL, before_BL, index_BL, config)
    context = Context(jnp.ones(entropy_BL.shape, jnp.int32))
    found = decide(Prediction(logit_BL), context, 40, max_chunk_len=longest)
    expected = ends(PATCHES[f"patch_lengths/{name}"], 40)
    last = 39 if name != "global_next" else 40  # without the next token the last patch ends at L
    assert np.array_equal(found.boundary_mask_BL[:, :last], expected[:, :last])
    assert 30 < expected.sum() < 60


def test_patches_of_equal_length_are_those_of_blt():
    """The rule gives the positions at which they begin."""
    for name, stride in (("static", 4), ("byte", 1)):
        place = Place(0, 1, 1, ChunkingConfig(float(stride)))
        rule = Fixed(Fixed.Config(), place, rngs=None)
        shape = (*PATCHES["entropies_BL"].shape, 1)
        context = Context(jnp.ones(shape[:2], jnp.int32))
        found = rule(Positions(jnp.zeros(shape), context, rule.config)).probability > 0.5
        starts = np.pad(ends(PATCHES[f"patch_lengths/{name}"], 40)[:, :-1], ((0, 0), (1, 0)))
        starts[:, 0] = True
        assert np.array_equal(found, starts)


@pytest.mark.parametrize("rule", ["global", "monotonic", "both"])
def test_threshold_gives_the_wanted_number_of_patches(rule):
    rng = np.random.default_rng(4)
    lengths = [400, 1, 2, 3, 211]
    index = np.concatenate([np.arange(n) for n in lengths]).astype(np.int32)
    H = np.float32(rng.gamma(2.0, 1.0, len(index)))
    before = np.pad(H[:-1], (1, 0))
    config = ThresholdConfig("", 4.5, rule=rule, increase=0.1)
    found = threshold(H, H - before, index, config)
    field = {"increase" if rule == "monotonic" else "theta": found}
    rules = Entropy.Config(rule=rule, **({"increase": 0.1} | field))
    assert np.sum(np.asarray(end_logit(H, before, index, rules)) > 0) == round(617 / 4.5)
    with pytest.raises(ConfigError, match="bytes_per_patch=1000: rule .* gives from 1 to"):
        threshold(H, H - before, index, replace(config, bytes_per_patch=1000))


def test_entropy_and_space_patches_are_those_of_blt():
    ours = entropy(jnp.asarray(PATCHES["logits_BLV"]))
    assert relative_error(ours, PATCHES["entropy_of_logits_BL"]) < 2e-5
    tokens = PATCHES["tokens_BL"]
    ids = jnp.asarray(np.where(tokens < 4, 254, tokens - 4), jnp.int32)
    mask = np.asarray(spacelike(ids, jnp.ones_like(ids)))
    expected = ends(PATCHES["patch_lengths/space_next"], tokens.shape[1])
    is_byte = tokens >= 4  # BLT's special tokens are boundaries; our documents begin with one
    assert np.array_equal(mask[is_byte], expected[is_byte]) and expected[:, 0].all()


@pytest.mark.parametrize("pool", ["mean", "max", "min"])
def test_patch_ids_and_pools_are_those_of_blt(pool):
    lengths, L = PIECES["patch_lengths_BM"], PIECES["patch_ids_BL"].shape[1]
    mask, ones = ends(lengths, L), np.ones((len(lengths), L), np.int32)

    def pooled(h_BLD):
        found = decided(jnp.asarray(mask, jnp.float32), ones, L)
        chunks = chunked(h_BLD, found, L, None, pool)
        x_BMD = chunks.x_BMD[:, : lengths.shape[1]]
        used_BM1 = (chunks.segment_ids_BM != 0)[:, : lengths.shape[1], None]
        return jnp.sum(jnp.where(used_BM1, x_BMD * PIECES["cot_BMD"], 0.0)), (x_BMD, chunks.slots)

    both = quick_jit(jax.grad(pooled, has_aux=True))
    gradient, (x_BMD, slots) = jax.device_get(both(PIECES["hidden_BLD"]))
    assert np.array_equal(slots.slot_BL, PIECES["decoder_patch_ids_BL"])
    for b, count in enumerate(mask.sum(1)):  # the last patch of a row goes on, ours is not pooled
        closed = np.flatnonzero(mask[b])[-1] + 1
        own = np.concatenate([[0], np.cumsum(mask[b])[:-1]])
        assert np.array_equal(own, PIECES["patch_ids_BL"][b]), "patch that a position belongs to"
        assert relative_error(x_BMD[b, :count], PIECES[f"pool_{pool}/out_BMD"][b, :count]) < 2e-5
        theirs = PIECES[f"pool_{pool}/grad_hidden_BLD"][b, :closed]
        assert relative_error(gradient[b, :closed], theirs) < 1e-4


# --- the second model -----------------------------------------------------------------------------

SECOND = HNetConfig(
    (StageConfig(("t1", ), 16, num_heads=2, rotary_emb_dim=4, window_size=5),), ssm=ATTENTION.ssm
)  # fmt: skip


def patched(checkpoint, **fields) -> HNetConfig:
    """ATTENTION with patches from the entropies of this run."""
    chunking = ChunkingConfig(
        3.0, Entropy.Config(str(checkpoint), **fields), "end", "first", "mean", "repeat", "add",
        losses=(), hold_rate=True,
    )  # fmt: skip
    outer, main = ATTENTION.stages
    return replace(ATTENTION, stages=(replace(outer, chunking=chunking), main))


@pytest.fixture(scope="module")
def second(tmp_path_factory) -> Path:
    """A run of two updates."""
    folder = tmp_path_factory.mktemp("second") / "run"
    config = tiny_run(folder, model=SECOND)
    run(replace(config, train=replace(config.train, steps=2)))
    return folder


@pytest.mark.every
def test_a_run_of_ours_is_the_second_model(second, tmp_path, quick_compilation):
    """Its parameters are copied, stay as they are, and decide; afterwards the run may be gone."""
    lent = shutil.copytree(second, tmp_path / "lent")
    config = tiny_run(tmp_path / "run", model=patched(lent))
    run(replace(config, train=replace(config.train, steps=3)))
    theirs = load(second)
    shutil.rmtree(lent)
    model = load(tmp_path / "run")
    written = read_config(tmp_path / "run").model.stages[0].chunking.predictor
    assert written.language_model == SECOND
    frozen = split(model)[1]["backbone"]["routing_module"]["language_model"]
    jax.tree.map(np.testing.assert_array_equal, frozen, split(theirs)[1])

    ids = np.random.default_rng(1).integers(97, 123, (2, 29)).astype(np.int32)
    segments = np.stack([np.ones(29), np.repeat([1, 2], [12, 17])]).astype(np.int32)
    read = lambda ids, segments: (model(ids, segments)[1][0], entropy(theirs(ids, segments)[0]))
    record, H = jax.device_get(quick_jit(read)(ids, segments))
    theta = 1.3354 - float(model.backbone.boundary_offset[0])
    starts = np.diff(segments, axis=1, prepend=0) != 0
    assert np.array_equal(record.boundary_mask_BL, (H > theta) | starts)
    lengths, lens = np.int32([7, 0]), stream.full_lens(model.config, 29)
    start = lambda ids: (model(ids), stream.prefill(model, ids[:, :7], lengths, lens))
    (whole, whole_record), (logits, _, cache) = quick_jit(start)(ids)
    np.testing.assert_allclose(logits[0], whole[0, 6], rtol=0, atol=1e-5)
    step = quick_jit(lambda cache, byte: stream.step(model, cache, byte))
    for t in range(7, 12):
        logits, found, cache = step(cache, np.stack([ids[0, t], ids[1, t - 7]]))
        np.testing.assert_allclose(logits[0], whole[0, t], rtol=0, atol=1e-5)
        np.testing.assert_allclose(logits[1], whole[1, t - 7], rtol=0, atol=1e-5)
        assert found.mask_BS[0, 0] == whole_record[0].boundary_mask_BL[0, t]


def test_what_cannot_be_a_second_model_is_one_line(second, tmp_path):
    content = to_json(patched(second))
    found = content["stages"][0]["chunking"]["predictor"]["language_model"]
    assert found == to_json(SECOND), "the network of the run stands in the configuration"
    assert from_json(HNetConfig, content) == patched(second)

    def refused(model, says, field="predictor.checkpoint="):
        with pytest.raises(ConfigError, match=f"{field}.*{says}") as error:
            model().read_files()
        assert "\n" not in str(error.value)

    run_without_bos = replace(tiny_run(tmp_path).data, bos_eos=False)
    with pytest.raises(ConfigError, match="trained with data.bos_eos=True, and this run has .*Fal"):
        tiny_run(tmp_path, model=patched(second), data=run_without_bos)
    refused(lambda: patched(""), "holds no run: train a byte model there")
    refused(lambda: patched(tmp_path), "holds no run")
    refused(lambda: patched(second, language_model=replace(SECOND, tie_embeddings=True)), "another")
    for changes, says in (
        ({"stages": ATTENTION.stages}, "its model chunks: use a run of a plain stack"),
        ({"vocab_size": 300}, "vocab_size=300: use one of bytes"),
        ({"stages": (replace(SECOND.stages[0], window_size=-1),)}, "window_size 512"),
    ):
        other = replace(SECOND, **changes)
        refused(lambda other=other: patched(second, language_model=other), says)
