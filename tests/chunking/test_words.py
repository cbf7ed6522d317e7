"""Rules of words and their parts, against the numbers of the reference implementations.

tests/golden/family/words.npz; sources and what is odd in them: tests/golden/README.md.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hnet.chunking.boundaries import Prediction, decide
from hnet.chunking.config import ChunkingConfig
from hnet.chunking.dechunks.indexed import Indexed
from hnet.chunking.part import Place, Positions
from hnet.chunking.pools.concat import Concat
from hnet.chunking.pools.linear import Linear
from hnet.chunking.predictors.hat_words import HatWords, hat_words
from hnet.chunking.predictors.words import white_space, words
from hnet.chunking.slots import open_slots
from hnet.nn.context import Context
from tests import golden_data
from tests.networks import quick_jit


@cache
def golden():
    return golden_data.load("family/words")


@cache
def texts():
    """Bytes (cases, L) and segment ids, and a function that splits values of all bytes by case."""
    text = golden_data.part(golden(), "text")
    lengths = text["lengths"]
    ids = np.zeros((len(lengths), lengths.max()), np.int32)
    valid = np.arange(ids.shape[1]) < lengths[:, None]
    ids[valid] = text["bytes"]

    def rows(values):
        out = np.zeros(ids.shape, values.dtype)
        out[valid] = values
        return out

    return ids, valid.astype(np.int32), rows


# Case and byte of the white space at which the reference gives the level of a later newline.
LEAKS = 6


@pytest.mark.parametrize("every", [(1,), (1, 2), (1, 2, 4)])
def test_levels_of_words_are_those_of_au_net_except_for_its_leak(every):
    ids, segments, rows = texts()
    expected = rows(golden()["text/" + "+".join(f"word{n}" for n in every)])
    found = np.where(segments, quick_jit(words(every))(ids, segments), 0)
    assert sorted(set(expected.ravel())) == list(range(len(every) + 1))
    different = np.flatnonzero((found != expected).any(1))
    assert len(different) == LEAKS
    for row in different:
        *earlier, last = np.flatnonzero(found[row] != expected[row])
        assert (expected[row, last], found[row, last]) == (0, len(every))
        assert ids[row, last] in b"\r\n" and ids[row, last - 1] in b" "
        assert all(expected[row, t] > found[row, t] for t in earlier)


def test_levels_of_words_by_hand():
    text = b"\xfeone two  three, 1234\n \nfour\xc3\xa9 \xff\xfesix \x80"
    levels = b"00001000200000031300330000000010000010"
    segments = np.ones((1, len(text)), np.int32)
    found = quick_jit(words((1, 2, 3)))(
        np.frombuffer(text, np.uint8).astype(np.int32)[None], segments
    )
    assert "".join(map(str, found[0])) == levels.decode()


def loaded(prefix, D, E):
    """Pool and dechunk with the reference's parameters."""
    found = {k.removeprefix(prefix): a for k, a in golden().items() if k.startswith(prefix)}
    place = Place(0, D, E, ChunkingConfig())
    pool = Linear(Linear.Config(), place, rngs=nnx.Rngs(0))
    dechunk = Indexed(Indexed.Config(), place, rngs=nnx.Rngs(0))
    pool.norm.scale[...] = found["down_norm.weight"]
    pool.proj.kernel[...] = found["trans_down.weight"].T
    dechunk.norm.scale[...] = found["up_norm.weight"]
    dechunk.proj.kernel[...] = found["trans_up.weight"].T
    dechunk.maps[...] = found["indexed_linear.weight"].transpose(0, 2, 1)
    return pool, dechunk


def boundaries_of(mask_BL, segments_BL, capacity, has_null_chunk=False):
    context = Context(jnp.asarray(segments_BL, jnp.int32))
    prediction = Prediction(prob=jnp.asarray(mask_BL, jnp.float32))
    found = decide(prediction, context, capacity + has_null_chunk, has_null_chunk=has_null_chunk)
    return context, found, open_slots(found, context, capacity)


def test_pool_and_dechunk_by_linear_maps_have_the_values_and_gradients_of_au_net():
    z = golden_data.part(golden(), "transition")
    hidden, y = z["hidden_BLD"], z["y_BME"]
    B, M, E = y.shape
    segments = np.ones(hidden.shape[:2])
    graph, params = nnx.split(loaded("transition/param/", hidden.shape[-1], E))

    @quick_jit
    def run(params, hidden, y):
        context, found, slots = boundaries_of(z["mask_BL"], segments, M)
        used = slots.context.segment_ids_BL != 0

        def outputs(params, hidden, y):
            pool, dechunk = nnx.merge(graph, params)
            down = pool(Positions(hidden, context, pool.config), found, slots)
            return jnp.where(used[..., None], down, 0), dechunk(y, found, slots, dechunk.config)

        (down, up), pull = jax.vjp(outputs, params, hidden, y)
        cot = jnp.where(used[..., None], z["down/cot_BME"], 0), z["up/cot_BLD"]
        return down, up, used, found.boundary_mask_BL, pull(cot)

    down, up, used, mask, (grads, grad_hidden, grad_y) = jax.device_get(run(params, hidden, y))
    clipped = z["mask_BL"].cumsum(1) > M
    assert np.array_equal(mask, z["mask_BL"] & ~clipped) and not used.all()
    close = lambda ours, theirs, tol=2e-5: golden_data.relative_error(ours, theirs) < tol
    assert close(down[used], z["down/out_BME"][used])
    assert close(up, z["up/out_BLD"])
    assert close(grad_y[used], z["up/grad_y_BME"][used], 1e-4)
    dechunk = grads[1]
    for ours, name in (
        (dechunk["norm"]["scale"], "up_norm"),
        (dechunk["proj"]["kernel"].T, "trans_up"),
        (dechunk["maps"].transpose(0, 2, 1), "indexed_linear"),
    ):
        assert close(ours, z[f"up/grad_param/{name}.weight"], 1e-4), name
    full = used.all(1)  # the reference also pools positions that are no boundary into unused slots
    assert full.any() and close(grad_hidden[full], z["down/grad_hidden_BLD"][full], 1e-4)


@pytest.mark.parametrize("kind", ["repeat", "scatter"])
def test_other_ways_up_of_au_net_are_indexed_maps(kind):
    """Repeated with embeddings of distances: a bias for each; scattered: only at boundaries."""
    z = golden_data.part(golden_data.load("family/aunet_transition"), kind)
    M, E, D = *z["y_BME"].shape[1:], z["up/out_BLD"].shape[-1]
    config = Indexed.Config(bias=kind == "repeat", at_boundaries=kind == "scatter")
    dechunk = Indexed(config, Place(0, D, E, ChunkingConfig()), rngs=nnx.Rngs(0))
    graph, tree = nnx.split(dechunk)
    tree = nnx.to_pure_dict(tree)
    weights = golden_data.part(z, "param")
    weights = {k: jnp.asarray(a) for k, a in weights.items() if "down" not in k}
    _, found, slots = boundaries_of(z["mask_BL"], np.ones(z["mask_BL"].shape), M)

    @quick_jit
    def run(weights, y_BME):
        def up(weights, y_BME):
            own = tree | {
                "norm": {"scale": weights["up_norm.weight"]},
                "proj": {"kernel": weights["trans_up.weight"].T},
                "maps": jnp.zeros_like(tree["maps"]),
            }
            if config.bias:
                own["bias"] = weights["pos_encoding.weight"] @ weights["trans_up.weight"].T
            return nnx.merge(graph, own)(y_BME, found, slots, config)

        out_BLD, pull = jax.vjp(up, weights, y_BME)
        return out_BLD, pull(z["up/cot_BLD"])

    out_BLD, (grads, grad_BME) = jax.device_get(run(weights, z["y_BME"]))
    assert golden_data.relative_error(out_BLD, z["up/out_BLD"]) < 2e-5
    used = np.asarray(slots.context.segment_ids_BL) != 0
    assert golden_data.relative_error(grad_BME[used], z["up/grad_y_BME"][used]) < 1e-4
    for name, ours in grads.items():
        assert golden_data.relative_error(ours, z[f"up/grad_param/{name}"]) < 1e-4, name


@pytest.mark.parametrize("limit", [0, 4, 10, 100])
def test_words_of_hat(limit):
    """Each word but the first is known at the last byte of its first character."""
    ids, segments, rows = texts()
    settings = HatWords.Config(limit)
    rule = HatWords(settings, Place(0, 1, 1, ChunkingConfig()), rngs=nnx.Rngs(0))
    x = Positions(jnp.zeros((*ids.shape, 1)), Context(segments, bytes_BL=ids), settings)
    found = np.where(segments, quick_jit(lambda: rule(x).probability)(), 0)
    ends = rows(golden()[f"text/hat_limit{limit}_ends" if limit else "text/hat_ends"])
    starts = np.pad(ends[:, :-1], ((0, 0), (1, 0))) & (segments != 0)
    expected = np.zeros_like(found)
    for row, byte in np.argwhere(starts):
        while byte + 1 < ids.shape[1] and 0x80 <= ids[row, byte + 1] < 0xC0:
            byte += 1
        expected[row, byte] = 1
    (different,) = np.flatnonzero((found != expected).any(1))
    first = np.flatnonzero(found[different] != expected[different])[0]
    assert bytes(ids[different, first : first + 4].tolist()) == "\tె".encode()  # space and a mark
    assert expected.sum() > 1000


def test_words_of_hat_by_hand():
    for text, words_of_text in (
        ("Hello, world!", ["Hello,", " world!"]),
        ("howAreYou", ["how", "Are", "You"]),
        ("how_are_you", ["how_", "are_", "you"]),
        ("can't 3.14  x\r\ny", ["can'", "t", " 3.", "14", "  ", "x", "\r\n", "y"]),
        ("ne\u0301B 1\u20442 1\u2044a", ["ne\u0301B", " 1\u20442", " 1\u2044", "a"]),
    ):
        ids = np.frombuffer(text.encode(), np.uint8).astype(np.int32)[None]
        found = np.asarray(quick_jit(hat_words())(ids, np.ones_like(ids)))[0]
        last_bytes = np.cumsum([len(c.encode()) for c in text]) - 1
        starts = np.cumsum([len(word) for word in words_of_text])[:-1]
        assert np.flatnonzero(found).tolist() == last_bytes[starts].tolist(), text


def test_white_space_by_unicode():
    text = "a b\u00a0c\u3000d\u200be\x1cf\x85\n\xff".encode()
    ids = np.frombuffer(text, np.uint8).astype(np.int32)[None]
    found = np.asarray(quick_jit(white_space())(ids, np.ones_like(ids)))[0]
    assert [text[: t + 1].decode()[-1] for t in np.flatnonzero(found)] == list(" \xa0\u3000\x85\n")


class Same(nnx.Module):
    """Ours is the last norm of the main network there."""

    def __call__(self, y):
        return y


@pytest.mark.parametrize("sizes", [(4, 1), (6, 2, 1)])
def test_patches_of_megabyte(sizes):
    """Patch vectors from bytes, and what the states of larger patches add to smaller ones and to
    bytes; gradients. sizes: number of bytes per position of each network."""
    z = golden_data.part(golden(), "megabyte" if len(sizes) == 2 else "megabyte_3")
    ids, stages = z["in/ids_BL"], len(sizes)
    B, L = ids.shape
    segments, parts, tables = np.ones((B, L)), [], []
    positions = lambda key: z[key][:, 1:].reshape(B, -1, z[key].shape[-1])  # without start vectors
    for s, P in enumerate(sizes[:-1]):
        own, added = f"token_embs.{stages - 1 - s}.", f"to_next_transformer_projections.{s}.1."
        found = {key: jnp.asarray(z[f"param/{key}"]) for key in weights_of(own, added)}
        E, width = found[own + "3.weight"].shape
        ratio, D = P // sizes[s + 1], len(found[added + "bias"]) * sizes[s + 1] // P
        place = Place(0, width // P, E, ChunkingConfig(alignment="end"))
        pool = Concat(Concat.Config(P), place, rngs=nnx.Rngs(0))
        maps = Indexed.Config(ratio, shared=False, bias=True)
        dechunk = Indexed(maps, place._replace(d_model=D), rngs=nnx.Rngs(0))
        pool.norm.rms.scale[...], pool.norm.bias[...] = (
            found[own + "2.weight"],
            found[own + "2.bias"],
        )
        pool.proj.kernel[...], pool.bias[...] = found[own + "3.weight"].T, found[own + "3.bias"]
        pool.out_norm.rms.scale[...] = found[own + "4.weight"]
        pool.out_norm.bias[...] = found[own + "4.bias"]
        dechunk.norm = Same()
        dechunk.maps[...] = found[added + "weight"].reshape(ratio, -1, E).transpose(0, 2, 1)
        dechunk.bias[...] = found[added + "bias"].reshape(ratio, -1)
        parts.append((pool, dechunk))
        tables.append(jnp.asarray(z[f"param/{own}0.weight"]))
    graph, params = nnx.split(parts)
    y = [jnp.asarray(z[f"inter/{s}/out"][:, :-1].reshape(B, L // P, -1))
         for s, P in enumerate(sizes[:-1])]  # fmt: skip

    @quick_jit
    def run(params, tables):
        def outputs(params, tables):
            down, read = [], []
            for s, (pool, dechunk) in enumerate(nnx.merge(graph, params)):
                P, index = sizes[s], np.arange(L)[None].repeat(B, 0)
                context, found, slots = boundaries_of(
                    index % P == P - 1, segments, L // P, has_null_chunk=True
                )
                slots = slots._replace(opened_at_BM=jnp.asarray(index[:, P - 1 :: P], jnp.int32))
                down.append(pool(Positions(tables[s][ids], context, pool.config), found, slots))
                inner = index[:, : L // sizes[s + 1]]
                starts = inner % (P // sizes[s + 1]) == 0
                _, found, slots = boundaries_of(starts, np.ones(inner.shape), L // P)
                read.append(dechunk(y[s], found, slots, dechunk.config))
            return down, read

        out, pull = jax.vjp(outputs, params, tables)
        cot = [jnp.asarray(positions(f"intergrad/{s}/in")) for s in range(stages)]
        return out, pull((cot[:-1], cot[1:]))

    (down, read), (grads, of_tables) = jax.device_get(run(params, tables))
    close = lambda ours, theirs, tol: golden_data.relative_error(ours, theirs) < tol
    assert close(down[0], positions("inter/0/in"), 2e-5)
    for s, ours in enumerate(read):
        own = down[s + 1] if s + 2 < stages else z["param/token_embs.0.weight"][ids]
        assert close(ours, positions(f"inter/{s + 1}/in") - own, 2e-5), s
    for s in range(stages - 1):
        pooled, added = grads[s][0], grads[s][1]
        own, to_next = f"token_embs.{stages - 1 - s}.", f"to_next_transformer_projections.{s}.1."
        for ours, name in (
            (pooled["norm"]["rms"]["scale"], own + "2.weight"),
            (pooled["norm"]["bias"], own + "2.bias"),
            (pooled["proj"]["kernel"].T, own + "3.weight"),
            (pooled["out_norm"]["bias"], own + "4.bias"),
            (
                added["maps"].transpose(0, 2, 1).reshape(-1, added["maps"].shape[1]),
                to_next + "weight",
            ),
            (added["bias"].ravel(), to_next + "bias"),
        ):
            assert close(ours, z[f"grad/param/{name}"], 1e-4), name
        if (stored := z[f"grad/param/{own}0.weight"]).ndim == 2:
            assert close(of_tables[s], stored, 1e-4)


def weights_of(own: str, added: str) -> list[str]:
    names = ("2.weight", "2.bias", "3.weight", "3.bias", "4.weight", "4.bias")
    return [*(own + name for name in names), added + "weight", added + "bias"]
