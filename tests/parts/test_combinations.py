"""Legal networks of (predictor, meaning of a boundary, pool, dechunk), each compiled once.

The suite runs few of them (`choices_of`): every part occurs, a pool, a dechunk and a learned
predictor with each meaning, and a dechunk with and without a learned predictor. All pairs of two
choices, and all triples, run with `pytest tests/parts --every-triple`.
"""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hnet.chunking.config import ChunkingConfig
from hnet.chunking.dechunks import prefix
from hnet.chunking.dechunks.cross_attention import CrossAttention
from hnet.chunking.pools import cross_attention as pools
from hnet.chunking.pools.latents import Latents
from hnet.chunking.pools.prefix import Prefix
from hnet.chunking.table import DECHUNKS, POOLS, PREDICTORS
from hnet.config import CrossAttentionConfig, HNetConfig, StageConfig
from hnet.decode import stream
from hnet.flops import param_counts
from hnet.nn.parameters import describe
from hnet.parts import settings_of
from hnet.train.config import MeshConfig
from hnet.train.sharding import make_mesh, state_shardings
from tests.networks import covering, quick_jit, random_params
from tests.parts.cheap import SETTINGS, limit_for, settings_for

B, L, V = 3, 19, 256
CAPACITY = 3  # slots per row where some are clipped
MEANINGS = (("start", "learned"), ("end", "learned"), ("end", "first"))
DOCUMENTS = np.repeat(np.int32([1, 2, 3]), (8, 7, 4))
TEXT = np.frombuffer(b"aZ9  ..,\n\x80\xc3", np.uint8)
EM_SPACE = np.frombuffer("\u2003".encode(), np.uint8)  # white space of three bytes

READ_ALIGNMENT = ("entropy",)  # rules that do
PLAIN = set(  # pools and dechunks without parameters
    "select mean smoothed last_before mean_before max min existence integrate "
    "ema repeat at_boundaries".split()
)
# Parts that differ from others only in what tests/parts/test_parts.py compares, and the parts with
# which they are combined here.
ALIKE = {
    "multi_cosine": ("mean_before",), "policy": ("mean",), "hazard": ("existence",),
    "cif": ("integrate", "mean"),
    "attention": ("whitespace", "words"), "smoothed": ("cosine", "mlp"),
    "max": ("mlp",), "min": ("fixed",),
    "last_before": ("cosine",), "mean_before": ("multi_cosine", "spacelike"),
    "existence": ("hazard", "cosine"), "integrate": ("cif",),
}  # fmt: skip


def config_of(predictor, alignment, null, pool, dechunk, memory=None, **more) -> HNetConfig:
    """memory: window of the decoder's cross-attention, if it has one without need."""
    needs_memory = settings_of(dechunk, DECHUNKS).part.needs_memory
    decoder = "x1p1" if memory or needs_memory else "p1"
    chunking = ChunkingConfig(
        3.0, predictor, alignment, null, settings_for(pool, POOLS), dechunk,
        "add" if alignment == "end" else "linear", losses=(),
        **{"max_chunk_len": limit_for(pool), **more},
    )  # fmt: skip
    stages = (
        StageConfig(
            ("p1", decoder),
            6,
            num_heads=2,
            rotary_emb_dim=2,
            chunking=chunking,
            cross_attention=CrossAttentionConfig(window=memory or 1),
        ),
        StageConfig(("p1",), 13 if alignment == "end" else 7),
    )
    return HNetConfig(stages, mixers=(("p", "tests.parts.cheap:Previous"),))


def legal() -> dict[str, tuple]:
    """Arguments of `config_of` by name."""
    found = {}
    read = [name for name in DECHUNKS.names if not DECHUNKS.find(name).stands_in_decoder]
    names = itertools.product(PREDICTORS.names, MEANINGS, POOLS.names, read)
    for predictor, (alignment, null), pool, dechunk in names:
        if (
            predictor in ALIKE
            and pool not in ALIKE[predictor]
            or pool in ALIKE
            and (predictor not in ALIKE[pool] or dechunk not in ("ema", "repeat"))
        ):
            continue
        given = SETTINGS.get(predictor, predictor)
        chunking = ChunkingConfig(3.0, given, alignment, null, pool, dechunk, losses=())
        reads_levels = PREDICTORS.find(predictor).reads_levels
        if not reads_levels and chunking.problem(stage_idx=0, route_groups=0) is None:
            meaning = alignment if alignment == "start" else f"end-{null}"
            name = f"{predictor} {meaning} {pool} {dechunk}"
            found[name] = (given, alignment, null, pool, dechunk)
    return found


def config_named(name: str) -> HNetConfig:
    return MORE[name] if name in MORE else config_of(*TRIPLES[name])


def in_passes() -> HNetConfig:
    """Two passes, boundaries of a learned predictor."""
    base = config_of("cosine", "start", "learned", "select", "repeat", 1, max_chunk_len=3)
    outer, inner = base.stages
    chunking = replace(
        outer.chunking, pool=Latents.Config(1, 1, 2),
        dechunk=CrossAttention.Config(projection=False, width=7),
    )  # fmt: skip
    memory = CrossAttentionConfig(memory_width=7)
    outer = replace(outer, chunking=chunking, passes=2, cross_attention=memory)
    return replace(base, stages=(outer, inner))


def is_learned(predictor: str) -> bool:
    return PREDICTORS.find(predictor).is_learned


def choices_of(triple: str) -> set[tuple]:
    """What of it must occur in one of the few. A pool or dechunk sees boundaries and their meaning
    (pools of `ALIKE` take null chunks as those do that they are like), a dechunk also whether a
    gradient passes their probabilities. A rule sees of the meaning its alignment at most; a pool
    and a dechunk see nothing of each other."""
    predictor, meaning, pool, dechunk = triple.split()
    learned = is_learned(predictor)
    of_rule = meaning.split("-")[0] if predictor in READ_ALIGNMENT else ""
    seen = (predictor, meaning if learned else of_rule)
    as_pool = meaning.split("-")[0] if pool in ALIKE else meaning
    return {seen, (as_pool, pool), (meaning, dechunk), (learned, dechunk)}


def kinds_of(triple: str) -> set[str]:
    """Its learned predictor, its pool and dechunk, and its meaning."""
    return {name for name in triple.split() if name not in PREDICTORS.names or is_learned(name)}


def kinds_with_parameters(triple: str) -> set[str]:
    return kinds_of(triple) - PLAIN


def few(choices) -> list[str]:
    """Some triples in which all choices of legal triples occur, rather without cross-attention,
    which compiles slowly."""
    names = sorted(TRIPLES, key=lambda name: "cross_attention" in name)
    return covering({name: choices(name) for name in names})


TRIPLES = legal()
MORE = {
    "mlp, at most 2": config_of("mlp", "end", "learned", "mean", "repeat", max_chunk_len=2),
    "cosine, at most 3": config_of("cosine", "start", "learned", "select", "ema", max_chunk_len=3),
    "mlp, at characters": config_of(
        "mlp", "end", "learned", "mean", "repeat", at_characters=True, max_chunk_len=5
    ),
    "cosine, at characters": config_of(
        "cosine", "start", "learned", "select", "ema", at_characters=True
    ),
    "memory of 3 chunks": config_of(
        "mlp", "end", "learned", "mean", CrossAttention.Config(2), 3, decoder_scope="chunk"
    ),
    "several tokens per chunk": config_of(
        "whitespace",
        "end",
        "first",
        Prefix.Config(2, 3),
        CrossAttention.Config(2),
        decoder_scope="chunk",
    ),
    "tokens of learned queries": config_of(
        "fixed",
        "end",
        "learned",
        pools.CrossAttention.Config(2, 2, "learned", "tokens", 2),
        CrossAttention.Config(projection=False),
        2,
    ),
    "prefixes instead of ends": config_of(
        "mlp", "end", "first", "mean", prefix.Prefix.Config(2), decoder_scope="chunk"
    ),
    "prefixes before starts": config_of(
        "cosine",
        "start",
        "learned",
        "select",
        prefix.Prefix.Config(2),
        decoder_scope="chunk",
        max_chunk_len=5,
    ),
    "two passes of latents": in_passes(),
    "memory of all chunks": config_of("spacelike", "end", "first", "mean", "repeat", -1),
}


def bits(a):
    return np.asarray(a, np.float32).view(np.uint32)


def expect_clipped(logits, mask, tight, tight_mask, *, has_null_chunk):
    """A row of DOCUMENTS has exactly CAPACITY slots: nothing changes before the first boundary or
    null chunk without a slot, which has no effect."""
    starts = np.diff(DOCUMENTS, prepend=0) != 0
    opens = mask.astype(np.int32) + (has_null_chunk & starts[None])
    slots = np.cumsum(opens, axis=1)
    assert np.array_equal(tight_mask, mask & (slots <= CAPACITY))
    before, dropped = slots <= CAPACITY, (slots > CAPACITY) & (opens > 0)
    np.testing.assert_allclose(tight[before], logits[before], rtol=0, atol=1e-5)
    assert np.any(tight[dropped] != logits[dropped])


def test_few_triples_have_every_part_in_every_meaning():
    taken = [name.split() for name in few(choices_of)]
    assert len(taken) < len(TRIPLES) / 15 and set(map(" ".join, taken)) <= set(TRIPLES)
    for predictor, meaning, pool, dechunk in map(str.split, TRIPLES):
        learned = is_learned(predictor)
        own = [t for t in taken if t[0] == predictor]
        assert own and (not learned or any(t[1] == meaning for t in own))
        for i, part in ((2, pool), (3, dechunk)):
            same = meaning[:3] if part in ALIKE else meaning
            assert any(t[1].startswith(same) and t[i] == part for t in taken)
        assert any(t[3] == dechunk and is_learned(t[0]) == learned for t in taken)
    assert {t[1][:3] for t in taken if t[0] == "entropy"} == {"sta", "end"}


# With the default seed all or no positions are boundaries; or rounding is over 1e-5, by 3 %.
OTHER_SEED = ("mlp end-first prefix", "entropy start select ema")


# tests/chunking/test_characters.py cuts at characters with both alignments
SEEN = ("mlp, at most 2", "cosine, at characters")


@pytest.mark.few(
    "triple", few(choices_of), [*TRIPLES, *SEEN], beside=[name for name in MORE if name not in SEEN]
)
def test_triple(triple):
    """One program per triple: causal bit for bit, steps = forward, packing, capacity, gradients."""
    config = config_named(triple)
    graph, params = random_params(config, 4 if triple.startswith(OTHER_SEED) else 3)
    rng = np.random.default_rng(7)
    lengths_B = np.int32([6, 1, 0])
    cotangent = rng.normal(size=(B, L, V)).astype(np.float32)
    external = rng.random((B, L)) < 0.4
    is_external = config.stages[0].chunking.predictor.name == "external"

    @quick_jit
    def everything(params, ids_BL, segment_ids_BL, told_BL):
        told = {"boundaries_BL": told_BL} if is_external else {}

        def forward(params, capacities=None):
            model = nnx.merge(graph, params)
            return model(ids_BL, segment_ids_BL, capacities=capacities, **told)

        def scalar(params):
            logits_BLV, records = forward(params)
            return jnp.sum(logits_BLV * cotangent), (logits_BLV, records[0])

        (_, (logits_BLV, record)), grads = jax.value_and_grad(scalar, has_aux=True)(params)
        model, room = nnx.merge(graph, params), stream.full_lens(config, L)
        first = {"boundaries_BL": told_BL[:, :6]} if is_external else {}
        prompt_BV, _, cache = stream.prefill(model, ids_BL[:, :6], lengths_B, room, **first)

        def one(carry, _):
            cache, position_B = carry
            at = (jnp.arange(B, dtype=jnp.int32), jnp.minimum(position_B, L - 1))
            told_B = told_BL[at] if is_external else None
            logits_BV, found, cache = stream.step(
                model, cache, ids_BL[at], position_B < L, boundary_B=told_B
            )
            return (cache, position_B + 1), (logits_BV, found.mask_BS[:, 0], position_B)

        steps = jax.lax.scan(one, (cache, jnp.asarray(lengths_B)), length=L)[1]
        tight_BLV, tight = forward(params, (CAPACITY,))
        return logits_BLV, record, grads, prompt_BV, steps, (tight_BLV, tight[0].boundary_mask_BL)

    def run(ids, segments, told=external):
        return jax.device_get(everything(params, ids, segments, told))

    ids = rng.choice(TEXT, (B, L)).astype(np.int32)
    ones = np.ones((B, L), np.int32)
    ids[:, 10 : 10 + len(EM_SPACE)] = EM_SPACE
    logits, record, grads, prompt, steps, _ = run(ids, ones)
    mask = record.boundary_mask_BL

    assert 0 < mask[:, 1:].sum() < mask[:, 1:].size, "some positions are boundaries, some not"
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.all(np.isfinite(grad)), path
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == sum(param_counts(config).values())

    np.testing.assert_allclose(prompt[:2], logits[[0, 1], [5, 0]], rtol=0, atol=1e-5)
    for step_logits, step_mask, position in zip(*steps):
        for b in range(B):
            if (t := position[b]) < L:
                np.testing.assert_allclose(step_logits[b], logits[b, t], rtol=0, atol=1e-5)
                assert step_mask[b] == mask[b, t]

    changed, told = ids.copy(), external.copy()
    times = (9, 1, 14)
    for b, t in enumerate(times):
        changed[b, t:] = (changed[b, t:] + 101) % 256
        told[b, t:] = ~told[b, t:]
    after, after_record, *_ = run(changed, ones, told)
    for b, t in enumerate(times):
        assert np.array_equal(bits(after[b, :t]), bits(logits[b, :t]))
        assert np.array_equal(after_record.boundary_mask_BL[b, :t], mask[b, :t])
        assert not np.array_equal(after[b, t], logits[b, t])

    packed, packed_record, *_, tight = run(ids, np.stack([DOCUMENTS] * B))
    has_null_chunk = config.stages[0].chunking.has_null_chunk
    expect_clipped(packed, packed_record.boundary_mask_BL, *tight, has_null_chunk=has_null_chunk)
    apart, told = np.zeros_like(ids), np.zeros_like(external)
    segments = np.zeros_like(ids)
    ends = np.cumsum(np.bincount(DOCUMENTS)[1:])
    for row, (start, end) in enumerate(zip((0, *ends), ends)):
        apart[row, : end - start] = ids[0, start:end]
        told[row, : end - start] = external[0, start:end]
        segments[row, : end - start] = 1
    separate, separate_record, *_ = run(apart, segments, told)
    for row, (start, end) in enumerate(zip((0, *ends), ends)):
        n = end - start
        np.testing.assert_allclose(packed[0, start:end], separate[row, :n], rtol=0, atol=1e-5)
        ours = packed_record.boundary_mask_BL[0, start:end]
        assert np.array_equal(ours, separate_record.boundary_mask_BL[row, :n])


@pytest.mark.few("name", few(kinds_with_parameters), few(kinds_of))
def test_two_micro_batches_on_two_by_two_devices_are_one_batch(name):
    """Their gradients add up to the batch's; parameters are sharded by their axes, rows by fsdp."""
    config = config_named(name)
    graph, params = random_params(config)
    rng = np.random.default_rng(7)
    ids = rng.choice(TEXT, (4, L)).astype(np.int32)
    told, cotangent = rng.random((4, L)) < 0.4, rng.normal(size=(4, L, V)).astype(np.float32)
    is_external = config.stages[0].chunking.predictor.name == "external"

    def gradient(params, ids_BL, told_BL, cotangent_BLV):
        def scalar(params):
            extra = {"boundaries_BL": told_BL} if is_external else {}
            return jnp.sum(nnx.merge(graph, params)(ids_BL, **extra)[0] * cotangent_BLV)

        return jax.grad(scalar)(params)

    mesh = make_mesh(MeshConfig(1, 2, 2), jax.devices()[:4])
    shardings = state_shardings(params, describe(nnx.merge(graph, params)), mesh)
    assert sum(any(s.spec) for s in jax.tree.leaves(shardings)) >= 4

    def micro_batches(params, *batch):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            add = lambda sums, part: (jax.tree.map(jnp.add, sums, gradient(params, *part)), None)
            return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), batch)[0]

    halves = [a.reshape(2, 2, *a.shape[1:]) for a in (ids, told, cotangent)]
    by_rows = NamedSharding(mesh, P(None, ("data", "fsdp")))
    sums = quick_jit(micro_batches, out_shardings=shardings)(
        jax.device_put(params, shardings), *jax.device_put(halves, by_rows)
    )
    whole = quick_jit(gradient)(params, ids, told, cotangent)

    def close(ours, theirs):
        atol = 2e-5 * np.abs(theirs).max() + 1e-5
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)

    jax.tree.map(close, jax.device_get(sums), jax.device_get(whole))
