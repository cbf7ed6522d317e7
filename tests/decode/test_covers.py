"""Probabilities of bytes under a model of tokens: the published code, sums over all sequences."""

import codecs
import itertools

import numpy as np
import pytest
from tokenizers import Tokenizer

from hnet.config import BOS_ID, EOS_ID
from hnet.data.tokenizers import Wanted
from hnet.data.tokens import LongestMatch, read_vocabulary
from hnet.decode.canonical import Canonical
from hnet.decode.covers import Covers, Pieces
from tests.golden_data import load, part

SPACE = "▁"
PIECE, BYTE = 0, 1


class SentencePiece:
    """The BPE with byte fallback of the stored numbers, as a slow loop."""

    def __init__(self, numbers):
        self.kind_V = numbers["kind_V"]
        pieces = bytes(numbers["pieces"].astype(np.uint8)).decode().split("\n")
        self.scores = dict(zip(pieces, numbers["score_V"].tolist()))
        self.id_of = {piece: i for i, piece in enumerate(pieces)}
        special = iter(range(256, 256 + len(pieces)))
        self.pieces = []
        for piece, kind in zip(pieces, self.kind_V):
            byte = bytes([int(piece[1:-1], 0)]) if kind == BYTE else piece.encode()
            self.pieces.append(byte if kind <= BYTE else [next(special)])
        self.known = {}

    def encode(self, text):
        parts = list(text)
        while len(parts) > 1:
            pairs = ["".join(pair) for pair in itertools.pairwise(parts)]
            best = max(pairs, key=lambda pair: self.scores.get(pair, -np.inf))
            if self.kind_V[self.id_of.get(best, 0)] != PIECE or best not in self.id_of:
                break
            at = pairs.index(best)
            parts[at : at + 2] = [best]
        return [i for p in parts for i in ([self.id_of[p]] if p in self.id_of else self.bytes(p))]

    def bytes(self, character):
        return [self.id_of[f"<0x{byte:02X}>"] for byte in character.encode()]

    def allowed(self, ids):
        """Mask of the next token; a character that has begun goes on in bytes."""
        end = ids[max((k for k, i in enumerate(ids) if self.pieces[i][:3] == SPACE.encode()),
                      default=0) :]  # fmt: skip
        if end not in self.known:
            data = b"".join(map(bytes, (self.pieces[i] for i in end)))
            found = [self._may_follow(end, data, i) for i in range(len(self.pieces))]
            self.known[end] = np.array(found)
        return self.known[end]

    def _may_follow(self, end, data, i):
        decoder = codecs.getincrementaldecoder("utf-8")()
        whole = len(decoder.decode(data).encode())
        if self.kind_V[i] > BYTE:
            return whole == len(data)
        if whole < len(data) and self.kind_V[i] != BYTE:
            return False
        try:
            character = decoder.decode(bytes(self.pieces[i]))
        except UnicodeDecodeError:
            return False
        if whole < len(data) or (self.kind_V[i] == BYTE and not character):
            return character not in self.id_of
        return self.encode((data + self.pieces[i]).decode().replace(" ", SPACE)) == [*end, i]


def test_next_bytes_agree_with_the_published_code():
    numbers = load("family/exact_bytes")
    tokens = SentencePiece(numbers)
    table_VV = numbers["A_V6"] @ numbers["B_6V"]
    table_VV = table_VV - np.logaddexp.reduce(table_VV, axis=1, keepdims=True)
    pieces = Pieces(tokens.pieces, 256 + 3)
    for c in range(5):
        case = part(numbers, f"case{c}")
        prompt, rest = (
            (before + bytes(case[name].astype(np.uint8)).decode()).replace(" ", SPACE)
            for before, name in ((SPACE, "prompt"), ("", "continuation"))
        )
        assert [1, *tokens.encode(prompt)] == case["tokens"].tolist()
        covers, found = Covers(pieces, tokens.allowed, (1,)), []
        for at, byte in enumerate([*(prompt + rest).encode(), None]):
            covers.feed([table_VV[ids[-1]] for ids in covers.waiting])
            if at >= len(prompt.encode()):
                found.append(np.exp(covers.log_probs()))
            if byte is not None:
                covers.advance(byte)
        found_TX, expected_TX = np.stack(found), case["prob_TX"]
        np.testing.assert_array_equal(found_TX > 0, expected_TX > 0)
        np.testing.assert_allclose(found_TX, expected_TX, rtol=0, atol=2e-6)


KINDS = ("bpe", "unigram", "superbpe", "lib", "equal_info")
SAMPLE = "the cat's hat; that  hat the cat sat on the mat — 猫と犬，猫が the cafés, naïve café: "
PREFIXES = ("the ca", "t  h", "é caf", "猫，", "s, n", "'s—")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """tokenizer.json by kind, with about 30 tokens besides the bytes."""
    folder = tmp_path_factory.mktemp("tokenizers")
    for kind in KINDS:
        text = Wanted(kind, 290).train([SAMPLE.encode() * 3])
        (folder / kind).write_text(text)
    return {kind: str(folder / kind) for kind in KINDS}


def completions():
    """Beginnings of characters -> characters, a sample of them."""
    found, odd = {}, (0xD7, 0x3040)  # no letters, among letters
    for code in [
        *odd,
        *range(0x80, 0x800),
        *range(0x800, 0xD800, 31),
        *range(0xE000, 0x110000, 61),
    ]:
        for n in range(1, len(data := chr(code).encode())):
            found.setdefault(data[:n], []).append(data[n:])
    return {begun: rests[:: 1 + len(rests) // 64] for begun, rests in found.items()}


class Oracle:
    """Sums over all sequences of tokens whose bytes the library cuts into just these tokens."""

    def __init__(self, file):
        self.vocabulary = read_vocabulary(file)
        by_matches = isinstance(self.vocabulary, LongestMatch)
        self.library = None if by_matches else Tokenizer.from_file(file)
        self.pieces, self.rest_of, self.known = self.vocabulary.pieces, completions(), {}

    def is_canonical(self, ids):
        ended = ids[-1:] == (EOS_ID,)
        ids = ids[:-1] if ended else ids
        data = b"".join(self.pieces[i] for i in ids)
        if not self.library:
            whole = data.decode(errors="replace")[-1:] != "\ufffd"
            return tuple(self.vocabulary.encode(data)) == ids and (whole or not ended)
        for size in range(1 if ended else 4):
            begun = data[len(data) - size :]
            rests = self.rest_of.get(begun, []) if size else [b""]
            for rest in rests:
                try:
                    text = (data + rest).decode()
                except UnicodeDecodeError:
                    continue
                found = self.vocabulary._id_T[self.library.encode(text).ids]
                if tuple(found[: len(ids)]) == ids:
                    return True
        return False

    def next_bytes(self, log_prob, text):
        """Probability of each byte after the text. log_prob: of a token after a sequence."""
        mass, ways = np.zeros(256), [((), 0.0)]
        while ways:
            ids, total = ways.pop()
            left = text[sum(len(self.pieces[i]) for i in ids) :]
            for i, piece in enumerate(self.pieces):
                if len(piece) <= len(left) and left.startswith(piece):
                    ways.append(((*ids, i), total + log_prob(ids)[i]))
                elif piece.startswith(left) and self.is_canonical((*ids, i)):
                    mass[piece[len(left)]] += np.exp(total + log_prob(ids)[i])
        return mass / mass.sum()


@pytest.mark.parametrize("kind", KINDS)
def test_next_bytes_are_sums_over_all_canonical_sequences(files, kind):
    oracle, rng = Oracle(files[kind]), np.random.default_rng(3)
    size = len(oracle.pieces)
    table_VV = 2.0 * rng.normal(size=(size, size))
    table_VV -= np.logaddexp.reduce(table_VV, axis=1, keepdims=True)
    log_prob = lambda ids: table_VV[ids[-1] if ids else BOS_ID]
    allowed = Canonical(oracle.vocabulary, eos=True)
    for text in PREFIXES:
        covers, data = Covers(Pieces(oracle.pieces), allowed), text.encode()
        for at in range(len(data) + 1):
            covers.feed([log_prob(ids) for ids in covers.waiting])
            found, expected = np.exp(covers.log_probs()), oracle.next_bytes(log_prob, data[:at])
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)
            if at < len(data):
                covers.advance(data[at])
