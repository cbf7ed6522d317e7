"""Every embedding of the table: streaming, packing and causality, and its own equations."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hnet.config import HNetConfig, StageConfig
from hnet.errors import ConfigError
from hnet.fields import from_json, to_json
from hnet.nn.context import Context
from hnet.nn.embeddings import EMBEDDINGS
from hnet.nn.embeddings.glyphs import Glyphs, glyph_images, glyph_table
from hnet.nn.embeddings.hash_ngrams import PRIMES, HashNgrams, ngram_hash
from hnet.nn.embeddings.lexinvariant import Lexinvariant
from hnet.nn.embeddings.part import Embedding
from hnet.nn.parameters import describe
from hnet.parts import settings_of
from tests.networks import quick_jit

GOLDEN = Path(__file__).parents[1] / "golden" / "family"

B, L, V, D = 3, 23, 256, 7
SEGMENTS = np.stack(
    [
        np.ones(L, np.int32),
        np.repeat(np.int32([1, 2, 3]), (9, 11, 3)),
        np.where(np.arange(L) < 17, np.repeat(np.int32([1, 2, 3]), (9, 11, 3)), 0),
    ]
)
ONE_DOCUMENT = np.where(np.arange(L)[None] < np.int32([[L], [7], [0]]), 1, 0).astype(np.int32)
IDS = np.random.default_rng(0).integers(0, V, (B, L)).astype(np.int32)
IDS[:, 9:] = IDS[:, : L - 9]  # a document begins like another


def made(settings) -> Embedding:
    return settings.part(settings, V, D, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("name", EMBEDDINGS.names)
def test_an_embedding_streams_what_it_computes(name):
    """Packed documents, padding, the state after rows of one document, and named axes."""
    embedding = made(settings_of(name, EMBEDDINGS))
    describe(embedding)
    graph, params = nnx.split(embedding)

    @quick_jit
    def both(params, ids_BL, segment_ids_BL):
        part, context = nnx.merge(graph, params), Context(segment_ids_BL)
        slow, state = part._step_through(ids_BL, context)
        return part(ids_BL, context), slow, part.after(ids_BL, context), state

    for segments in (SEGMENTS, ONE_DOCUMENT):
        whole, slow, after, state = jax.device_get(both(params, IDS, segments))
        np.testing.assert_allclose(whole[segments != 0], slow[segments != 0], rtol=0, atol=2e-6)
        assert whole.shape == (B, L, D) and np.std(whole[segments != 0]) > 0.1
    for ours, theirs in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(ours[:2], theirs[:2])
    changed = IDS.copy()
    changed[0, 13:] = (changed[0, 13:] + 1) % V
    again = jax.device_get(both(params, changed, SEGMENTS))[0]
    before = jax.device_get(both(params, IDS, SEGMENTS))[0]
    assert np.array_equal(again[0, :13], before[0, :13])
    assert np.any(again[0, 13:] != before[0, 13:], axis=-1).all()


def test_an_unknown_embedding_and_export_are_one_line():
    stage = StageConfig(("m1",), 64)
    with pytest.raises(ConfigError, match="embedding 'byts' is unknown: use bytes"):
        HNetConfig((stage,), embedding="byts")
    content = to_json(HNetConfig((stage,)))
    assert content["embedding"] == {"name": "bytes"}
    assert from_json(HNetConfig, content | {"embedding": "bytes"}) == HNetConfig((stage,))
    del content["embedding"]
    assert from_json(HNetConfig, content) == HNetConfig((stage,))
    mine = f"{__name__}:Ones"
    config = HNetConfig((stage,), embedding=mine)
    with pytest.raises(ConfigError, match="model.embedding='.*Ones' has no official form"):
        config.to_json()
    part = made(config.embedding)
    x_BLD = part(jnp.asarray(IDS), Context(jnp.asarray(SEGMENTS)))
    assert np.array_equal(x_BLD[:, :, 0], IDS), "the whole rows are derived from the steps"
    with pytest.raises(TypeError, match="no table to tie the head to"):
        part.attend(x_BLD)


class Ones(Embedding):
    """The byte value in every channel."""

    def step(self, state, byte_R):
        return state, jnp.repeat(byte_R.astype(jnp.float32)[:, None], D, axis=1)


# --- hashed n-grams -------------------------------------------------------------------------------


def test_hashes_are_those_of_blt():
    """ids of facebookresearch/blt for n = 2 to 8, three functions and three sizes of tables."""
    golden = np.load(GOLDEN / "blt_patching_hash.npz")
    tokens_BL = golden["hash/tokens_BL"]
    names = [name for name in golden.files if name.startswith("hash/n")]
    assert len(names) == 35

    def windows(n):
        return [np.pad(tokens_BL, ((0, 0), (back, 0)))[:, : tokens_BL.shape[1]] for back in
                reversed(range(n))]  # fmt: skip

    @quick_jit
    def hashed():
        found = {}
        for name in names:
            n, function, rows = (int(part[1:]) for part in name.removeprefix("hash/").split("_"))
            found[name] = ngram_hash([*map(jnp.asarray, windows(n))], PRIMES[function], rows)
        return found

    for name, ids in jax.device_get(hashed()).items():
        assert np.array_equal(ids, golden[name]), name


@pytest.mark.parametrize("rows", [1, 2**21, 2**21 - 9])
def test_hashes_wrap_around_at_64_bits(rows):
    tokens = np.random.default_rng(rows).integers(0, 4096, (8, 101)).astype(np.int32)
    tokens[:, 0] = 4095  # the largest sums
    for prime in PRIMES:
        found = ngram_hash([*jnp.asarray(tokens)], prime, rows)
        for i, token in enumerate(tokens.T.tolist()):
            wrapped = sum(t * prime**k for k, t in enumerate(token)) % 2**64
            signed = wrapped - 2**64 * (wrapped >= 2**63)
            assert found[i] == signed % rows


def test_ngrams_of_a_document_begin_with_it():
    config = HashNgrams.Config(sizes=(2, 5), functions=2, rows=97)
    part = made(config)
    x_BLD = part(jnp.asarray(IDS), Context(jnp.asarray(SEGMENTS)))
    tables = np.asarray(part.hash_embeddings[...])
    for t, start in ((8, 0), (9, 9), (12, 9), (22, 20)):  # row 1: documents of 9, 11 and 3 bytes
        expected = np.asarray(part.embedding[...])[IDS[1, t]].copy()
        for table, (n, prime) in zip(tables, config.tables, strict=True):
            ids = [IDS[1, s] + 4 if s >= start else 0 for s in range(t - n + 1, t + 1)]
            total = sum(int(token) * prime**i for i, token in enumerate(ids)) % 2**64
            expected += table[(total - 2**64 * (total >= 2**63)) % 97]
        np.testing.assert_allclose(x_BLD[1, t], expected, rtol=0, atol=2e-6)
    assert config.num_parameters(V, D) == part.embedding.size + part.hash_embeddings.size


# --- lexinvariant ---------------------------------------------------------------------------------


def test_every_document_has_its_own_table_in_training():
    part = made(Lexinvariant.Config())
    segments = jnp.asarray(SEGMENTS)
    cotangent = np.random.default_rng(1).normal(size=(B, L, V)).astype(np.float32)
    cotangent[SEGMENTS == 0] = 0

    @quick_jit
    def run(key):
        context = Context(segments)
        x_BLD = part(jnp.asarray(IDS), context, key=key)

        def scalar(x_BLD):
            logits_BLV = part.attend(x_BLD, context, key=key)
            return jnp.sum(logits_BLV * cotangent), logits_BLV

        gradient, logits_BLV = jax.grad(scalar, has_aux=True)(x_BLD)
        return x_BLD, logits_BLV, gradient

    x, logits, gradient = jax.device_get(run(jax.random.key(1)))
    tables = {}
    for b in range(B):
        row_key = jax.random.fold_in(jax.random.key(1), b)
        for document in set(SEGMENTS[b]) - {0}:
            key = jax.random.fold_in(row_key, document)
            tables[b, document] = np.asarray(jax.random.normal(key, (V, D)))
    assert len({table.tobytes() for table in tables.values()}) == 6
    for b, t in np.argwhere(SEGMENTS != 0):
        table = tables[b, SEGMENTS[b, t]]
        np.testing.assert_allclose(x[b, t], table[IDS[b, t]], rtol=0, atol=2e-6)
        scale = D**-0.5
        np.testing.assert_allclose(logits[b, t], scale * table @ x[b, t], rtol=0, atol=3e-6)
        expected = scale * cotangent[b, t] @ table
        np.testing.assert_allclose(gradient[b, t], expected, rtol=0, atol=2e-5)
    again, other = run(jax.random.key(1)), run(jax.random.key(2))
    assert np.array_equal(again[0], x) and not np.any(other[0][:, 0] == x[:, 0])


# --- glyphs ---------------------------------------------------------------------------------------


def test_glyphs_are_images_of_the_bytes_and_frozen(tmp_path):
    config = Glyphs.Config()
    images = glyph_images(config.font, config.size).reshape(256, -1)
    table = np.asarray(made(config).embedding[...])
    np.testing.assert_allclose(np.mean(table**2), 1, rtol=1e-5)
    wide = glyph_table("", 16, 300)
    assert not wide[:, 255:].any()
    apart = np.linalg.norm(images[::7, None] - images[None, ::7], axis=-1)
    ours = np.linalg.norm(wide[::7, None].astype(np.float64) - wide[None, ::7], axis=-1)
    np.testing.assert_allclose(ours, apart * (ours[1, 9] / apart[1, 9]), rtol=0, atol=1e-3)

    graph, params = nnx.split(made(config))
    loss = lambda p: jnp.sum(nnx.merge(graph, p).attend(nnx.merge(graph, p).rows(IDS)))
    gradients = jax.grad(loss)(params)
    assert not np.any(jax.tree.leaves(gradients)[0]) and describe(made(config))["embedding"].frozen

    (tmp_path / "no.ttf").write_text("no font")
    for font, says in ((tmp_path / "no.ttf", "cannot be read"), (tmp_path / "x.ttf", "cannot be")):
        model = HNetConfig((StageConfig(("m1",), 64),), embedding=Glyphs.Config(font=str(font)))
        with pytest.raises(ConfigError, match=f"model.embedding.font=.*{says}"):
            model.read_files()
    nnx.eval_shape(lambda: made(model.embedding))  # a restored model does not need the font
    with pytest.raises(ConfigError, match="draws byte .* like another at size=3"):
        glyph_images("", 3)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"embedding": "lexinvariant"}, "model.tie_embeddings=False with embedding='lexinvariant'"),
        (
            {"embedding": "glyphs", "vocab_size": 300},
            "model.vocab_size=300 with embedding='glyphs'",
        ),
        ({"embedding": "hash_ngrams", "vocab_size": 5000}, "model.vocab_size=5000 with"),
        ({"embedding": HashNgrams.Config(sizes=(3, 3))}, "model.embedding.sizes="),
        ({"embedding": HashNgrams.Config(sizes=(9,))}, "model.embedding.sizes.0=9: use at most 8"),
        ({"embedding": HashNgrams.Config(rows=2**22)}, "model.embedding.rows=.*: use at most"),
    ],
)
def test_what_cannot_be_embedded_is_one_line(fields, says):
    with pytest.raises(ConfigError, match=says) as error:
        HNetConfig((StageConfig(("m1",), 64),), **fields)
    assert "\n" not in str(error.value)
