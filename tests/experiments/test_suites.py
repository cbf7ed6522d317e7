"""Each suite against values by hand or from a slow loop, and with models of known score."""

import json
import math
import os
import random
import re
from collections import Counter
from dataclasses import dataclass, field, replace

import jax
import numpy as np
import pytest
from flax import nnx

from hnet.data import open_part
from hnet.decode.generate import generate
from hnet.decode.sampling import Sampling
from hnet.decode.score import Score, logprobs
from hnet.errors import ConfigError
from hnet.inspect.fairness import cut_at
from hnet.model import HNetLM
from hnet.suites import (
    SUITES,
    arithmetic,
    chars,
    command,
    consistency,
    counting,
    diagnostic,
    fairness,
    markov,
    perturb,
    stability,
    surprise,
)
from hnet.suites.items import Item, Settings, ask, by_tags, with_shots
from hnet.suites.scorer import ModelScorer, bits_per_byte
from tests.networks import MLP_END, network, random_params, stage

pytestmark = pytest.mark.usefixtures("quick_compilation")
TEXTS = tuple(
    f"{word} is what passage number {i} is about, and {word} ends it with {word * 3}.".encode() * 2
    for i, word in enumerate(["harbour", "lantern", "meadow", "quarrel", "violin"])
)
SETTINGS = Settings(items=23, shots=2, seed=5, max_bytes=64, texts=TEXTS)


@dataclass
class Oracle:
    """Predicts every byte with certainty in a text that it knows, or in a prefix of one; elsewhere
    all bytes are equally likely. It knows all texts until some are given."""

    known: set[bytes] | None = None
    cut: object = lambda text: range(len(text))
    alignments: tuple = ("start",)
    seen: list[bytes] = field(default_factory=list)

    def score(self, texts):
        self.seen += texts
        return [self._score(text) for text in texts]

    def _score(self, text):
        knows = self.known is None or any(k.startswith(text) for k in self.known)
        logprobs = np.full(len(text), 0.0 if knows else -math.log(256), np.float32)
        return Score(text, logprobs, np.full(len(text), knows))

    def greedy(self, prompts, num_bytes):
        rest = lambda p: next((k[len(p) :] for k in self.known if k.startswith(p)), b"")
        return [rest(p).partition(b"\n")[0][:num_bytes] for p in prompts]

    def boundaries(self, texts):
        one = [cut_at(text, self.cut(text)) for text in texts]
        return [replace(seg, stages=seg.stages * len(self.alignments)) for seg in one]

    def in_bfloat16(self):
        return self


UNIFORM = Oracle(known=set())


def solutions(items):
    return {item.prompt + item.answer + b"\n" for item in items}


def question(item):
    """(question, answer) after the solved examples, as text."""
    return item.prompt.decode().split("\n")[-1], item.answer.decode()


# --- what suites share --------------------------------------------------------------------------


def test_an_answer_is_right_if_greedy_decoding_gives_it_and_its_end():
    items = [Item(b"1+1=", b"2", {"kind": k, "size": s}) for k, s in [("a", 1), ("b", 1), ("a", 2)]]

    class Almost(Oracle):  # does not know the end of the third
        def _score(self, text):
            greedy = np.array([False] * 4 + [True, len(self.seen) < 4])
            return Score(text, np.log(np.array([1] * 4 + [0.5, 0.125], np.float32)), greedy)

    model = Almost()
    answers = ask(model, items)
    assert model.seen == [b"1+1=2\n"] * 3
    model.seen.append(b"")
    assert [a.is_right for a in ask(model, items)] == [False] * 3
    rows = by_tags(answers, "kind")
    assert [(row["kind"], row["items"]) for row in rows] == [("a", 2), ("b", 1)]
    for row in rows:
        assert row["accuracy"] == row["byte_accuracy"] == row["majority"] == 1
        assert row["bpb"] == pytest.approx(2)
    both = [(row["kind"], row["size"]) for row in by_tags(answers[::-1], "kind", "size")]
    assert both == [("a", 1), ("a", 2), ("b", 1)]
    answers[0].item.tags["extra"] = 3
    (row,) = by_tags(answers, "extra")
    assert row["extra"] == 3 and row["items"] == 1


def test_the_majority_is_the_most_frequent_answer():
    answers = ask(UNIFORM, [Item(b"", answer, {"k": 0}) for answer in (b"no", b"yes", b"no")])
    (row,) = by_tags(answers, "k")
    assert row["majority"] == 2 / 3 and row["accuracy"] == 0 and row["bpb"] == pytest.approx(8)


def test_examples_are_other_questions_than_the_one_that_is_asked():
    make = lambda rng: (f"{(n := rng.randrange(3))}?", f"{n}!", {})
    items = with_shots(make, replace(SETTINGS, items=50), "kind")
    assert len(items) == 50
    for item in items:
        *shots, asked = item.prompt.decode().split("\n")
        assert len(shots) == 2 and all(re.fullmatch(r"(\d)\?\1!", shot) for shot in shots)
        assert all(not shot.startswith(asked) for shot in shots)
    assert with_shots(make, replace(SETTINGS, items=50), "kind") == items
    assert with_shots(make, replace(SETTINGS, items=50, seed=6), "kind") != items


def test_bits_per_byte_leave_out_what_nothing_predicts():
    half = np.log(np.array([np.nan, 0.5, 0.25], np.float32))
    assert bits_per_byte([Score(b"abc", half, half > 0)]) == pytest.approx(1.5)
    assert math.isnan(bits_per_byte([]))


# --- suites whose answers are exact ---------------------------------------------------------------

ITEMS = {
    "counting": counting.make_items,
    "diagnostic": diagnostic.make_items,
    "arithmetic": arithmetic.make_items,
    "chars": chars.make_items,
}


@pytest.mark.parametrize("name", ITEMS)
def test_an_oracle_is_always_right_and_a_uniform_model_never(name):
    items = ITEMS[name](SETTINGS)
    assert all(item.prompt.count(b"\n") == SETTINGS.shots for item in items)
    for model, accuracy, bpb in ((Oracle(solutions(items)), 1, 0), (UNIFORM, 0, 8)):
        rows = SUITES[name].run(model, SETTINGS)[name]
        assert sum(row["items"] for row in rows) == len(items) >= 23
        assert {row["accuracy"] for row in rows} == {accuracy}
        assert {row["byte_accuracy"] for row in rows} == {accuracy}
        assert all(row["bpb"] == pytest.approx(bpb) for row in rows)


def test_counting_items():
    items = counting.make_items(SETTINGS)
    assert Counter(item.tags["format"] for item in items) == dict.fromkeys(counting.JOINED, 23)
    for item in items:
        asked, answer = question(item)
        letter, text = asked.removesuffix(" = ").split(" in ", 1)
        letters = [c for c in text if c not in '", ']
        assert sum(c == letter for c in letters) == int(answer)
        low, high = map(int, item.tags["length"].split("-"))
        assert 10 <= low <= len(letters) <= high <= 40
    forms = {item.tags["format"]: question(item)[0] for item in items}
    assert re.search(r"in \w+ = $", forms["raw"]) and re.search(r"in (\w )+= $", forms["space"])
    assert re.search(r"in (\w, )+\w = $", forms["comma"])
    assert re.search(r'in ("\w" )+= $', forms["quote"])


def slow_vowel_removal(text):
    return "".join(c for c in text if c.lower() not in "aeiou")


def slow_contextual(text):
    kept = ""
    for before, c in zip(" " + text, text):
        deleted = c in "aeiouAEIOU" and before.islower() and before not in "aeiou"
        kept += "" if deleted else c
    return kept


def slow_merge(text):
    out, i = "", 0
    while i < len(text):
        found = text[i : i + 3] == "ABC"
        out, i = out + ("D" if found else text[i]), i + (3 if found else 1)
    return out


def test_diagnostic_items():
    slow = {
        "vowel removal": slow_vowel_removal,
        "contextual vowel removal": slow_contextual,
        "sequence merge": slow_merge,
    }
    assert slow_contextual("baBaaeXdI") == "bBaaeXd" and slow_merge("xABCABABC") == "xDABD"
    changed = Counter()
    for item in diagnostic.make_items(SETTINGS):
        asked, answer = question(item)
        text = re.fullmatch(r"#([A-Za-z]{64})=", asked)[1]
        assert answer == slow[item.tags["task"]](text)
        changed[item.tags["task"]] += len(text) - len(answer)
    # a text has 12.5 pairs, half of them in lower case, and 2.5 sequences on average
    assert 23 * 6 < changed["contextual vowel removal"] < 23 * 8.5
    assert 23 * 2 * 1.5 < changed["sequence merge"] < 23 * 2 * 3.5


def test_arithmetic_items():
    assert arithmetic.grouped(1234567, "comma_l2r") == "123,456,7"
    assert arithmetic.grouped(1234567, "comma_r2l") == "1,234,567"
    assert (
        arithmetic.grouped(123456, "space_r2l")
        == "123 456"
        == (arithmetic.grouped(123456, "space_l2r"))
    )
    assert arithmetic.grouped(12, "comma_r2l") == "12" and arithmetic.grouped(0, "nosep") == "0"
    items = arithmetic.make_items(SETTINGS)
    assert len(items) == 5 * len(arithmetic.LENGTHS) * 4
    for item in items:
        separator, _ = arithmetic.FORMATS[item.tags["format"]]
        for line in (item.prompt + item.answer).decode().split("\n"):
            terms = re.split(r"[+=]", line.replace(separator, "") if separator else line)
            assert int(terms[0]) + int(terms[1]) == int(terms[2])
            assert "{}+{}={}".format(*map(len, terms)) == item.tags["digits"]


def test_arithmetic_errors_by_place():
    items = [
        Item(b"1+9=", b"10", {"format": "nosep"}),
        Item(b"2+9=", b"11", {"format": "nosep"}),
        Item(b"600+600=", b"1,200", {"format": "comma_r2l"}),
    ]

    class Writes(Oracle):
        def greedy(self, prompts, num_bytes):
            return [b"13", b"1", b"1,2 zero 80"][: len(prompts)]

    forms = {row["format"]: row for row in arithmetic.errors(Writes(), items) if row}
    nosep = {"format": "nosep", "right_length": 0.5, "wrong_1": 0, "wrong_2": 1}
    assert forms["nosep"] == nosep
    assert forms["comma_r2l"]["right_length"] == 1
    assert [forms["comma_r2l"][f"wrong_{i}"] for i in (1, 2, 3, 4)] == [0, 0, 1, 0]
    assert "space_l2r" not in forms
    items = arithmetic.make_items(SETTINGS)
    for row in arithmetic.run(Oracle(solutions(items)), SETTINGS)["arithmetic errors"]:
        wrong = {value for name, value in row.items() if name.startswith("wrong")}
        assert row["right_length"] == 1 and wrong == {0}


def test_arithmetic_boundaries():
    assert arithmetic.numbers(b"12+345=") == [(0, 2), (3, 6)]
    assert arithmetic.numbers(b"a7") == [(1, 2)] and arithmetic.numbers(b"x") == []
    items = [Item(b"1234567+89=", b"1234656", {"format": "nosep"})]
    groups = Oracle(cut=lambda text: [1, 4, 7, 8, 12, 15])  # threes from the right
    (row,) = arithmetic.boundary_rates(groups, items)
    assert row == {"stage": 0, "from_right_0": 0, "from_right_1": 0, "from_right_2": 1}
    (row,) = arithmetic.boundary_rates(Oracle(cut=lambda text: [3, 9]), items)
    # inside numbers 5, 4 and 4 digits: 3 is 0 from the right modulo 3 (4567 -> 7 - 1 - 3), 9 too
    assert row == {"stage": 0, "from_right_0": 2 / 5, "from_right_1": 0, "from_right_2": 0}


def slow_answer(asked):
    """The answer to a question about a word, from its wording."""
    asked, kind = asked.rstrip("?. "), asked.split()[0]
    word = asked.split()[-1]
    match asked.split():
        case ["How", "many", "different", *_]:
            return str(len(Counter(word)))
        case ["How", "many", c, *_]:
            return str(sum(d == c for d in word))
        case ["Index", "of", "the", which, c, *_]:
            found = [i for i, d in enumerate(word) if d == c]
            return str(found[0] if which == "first" else found[-1])
        case ["Spell", _]:
            return " ".join(list(word))
        case ["Join", *letters]:
            return "".join(letters)
        case ["Is", "there", "a", c, *_]:
            return "yes" if any(c == d for d in word) else "no"
        case ["Add", new, "after", "each", c, *_]:
            return "".join(d + new if d == c else d for d in word)
        case ["Delete", "each", c, *_]:
            return "".join(d for d in word if d != c)
        case ["Replace", "each", c, "by", new, *_]:
            return "".join(new if d == c else d for d in word)
        case ["Swap", a, "and", b, *_]:
            return "".join({a: b, b: a}.get(d, d) for d in word)
    raise AssertionError(kind)


def test_chars_items():
    items = chars.make_items(SETTINGS)
    words = {w for t in TEXTS for w in re.findall("[a-z]+", t.decode()) if 4 <= len(w) <= 10}
    for item in items:
        asked, answer = question(item)
        assert answer == slow_answer(asked), asked
        if item.tags["task"] != "join":
            word = asked.rstrip("?. ").split()[-1]
            assert word in words and item.tags["length"] == len(word)
    assert {item.tags["task"] for item in items} == set(chars.TASKS)
    answers = Counter(item.answer for item in items if item.tags["task"] == "contains")
    assert set(answers) == {b"yes", b"no"} and min(answers.values()) > 3
    with pytest.raises(ConfigError, match="no words"):
        chars.make_items(replace(SETTINGS, texts=(b"to be or not",)))


def test_words_are_whole_and_of_letters_only():
    found = chars.words_by_length([b"Caf\xc3\xa9 x1234 12abcd Word word_ it's longestwords words"])
    assert found == {4: ["word"], 5: ["words"]}


def test_index_questions_know_the_chunk_that_holds_the_letter():
    items = [item for item in chars.make_items(SETTINGS) if "place" in item.tags]
    assert {item.tags["task"] for item in items} == {"first index", "last index"}
    chars.tag_chunks(Oracle(cut=lambda text: [len(text) - 7, len(text) - 3]), items)
    for item in items:
        asked, answer = question(item)
        asked = asked.rstrip(" ")
        word = asked.rstrip("?").split()[-1]
        left = len(word) - int(answer) + 2  # bytes from the letter to the end of "word? "
        size = 3 if left <= 3 else 4 if left <= 7 else len(item.prompt) - 7
        assert item.tags["chunk_bytes"] == size


# --- the other suites -----------------------------------------------------------------------------


def test_perturbations():
    rng = random.Random(3)
    assert perturb.ant_speak("a b", rng) == "A   B" and perturb.upper_case("aß", rng) == "ASS"
    text = "abcdefghij" * 1000
    assert perturb.clean(text, rng) == text
    dropped = perturb.drop(text, rng)
    assert 8800 < len(dropped) < 9200 and set(dropped) == set("abcdefghij")
    cased = perturb.random_case(text, rng)
    assert cased.lower() == text and 4800 < sum(map(str.isupper, cased)) < 5200
    runs = Counter(len(m[0]) for m in re.finditer(r"(.)\1*", perturb.repeat(text, rng)))
    assert set(runs) == {1, 2, 3, 4} and 7800 < runs[1] < 8200 and min(runs.values()) > 500
    swapped = perturb.swap(text, rng)
    moved = [i for i, (a, b) in enumerate(zip(text, swapped)) if a != b]
    assert sorted(swapped) == sorted(text) and 1600 < len(moved) < 2000
    for i, j in zip(moved[::2], moved[1::2]):
        assert j == i + 1 and (swapped[i], swapped[j]) == (text[j], text[i])
    assert perturb.perturbed("né".encode() + b"\xff", perturb.upper_case, 1) == "NÉ\ufffd".encode()


def test_robustness():
    assert perturb.robustness(0.35, 0.65, 0.25) == pytest.approx(25)  # .1 of .4 above chance
    assert perturb.robustness(0.65, 0.65, 0.25) == pytest.approx(100)
    assert perturb.robustness(0.3, 0.25, 0.25) is None


def test_perturb_with_models_whose_choice_is_known():
    questions = perturb.make_questions(SETTINGS)
    assert len(questions) == len(TEXTS)
    for text, (context, pieces) in zip(TEXTS, questions):
        assert context + pieces[0] == text and len(set(pieces)) == 4
        assert all(any(t.endswith(piece) for t in TEXTS) for piece in pieces)
    uniform = perturb.run(UNIFORM, SETTINGS)["perturb"]
    assert [row["perturbation"] for row in uniform] == list(perturb.PERTURBATIONS)
    for row in uniform:
        assert row["bpb"] == pytest.approx(8) and row["byte_accuracy"] == 0
        assert row["choice_accuracy"] == 0.25 and row["robustness"] is None
    # this one knows the text as it is, and nothing of it under any perturbation
    clean, *others = perturb.run(Oracle(set(TEXTS)), SETTINGS)["perturb"]
    assert clean["bpb"] == 0 and clean["byte_accuracy"] == clean["choice_accuracy"] == 1
    assert clean["robustness"] == clean["byte_robustness"] == pytest.approx(100)
    for row in others:
        assert row["bpb"] == pytest.approx(8) and row["choice_accuracy"] == 0.25
        assert row["robustness"] == 0 and row["byte_robustness"] == pytest.approx(-100 / 255)
    with pytest.raises(ConfigError, match="3 passages"):
        perturb.make_questions(replace(SETTINGS, texts=TEXTS[:3]))


@pytest.mark.parametrize("order", markov.ORDERS)
def test_chains_depend_on_one_symbol_only(order):
    text = markov.chain(order, 20_000, random.Random(order)).decode()
    for back in range(1, 6):
        changed = sum(a != b for a, b in zip(text, text[back:])) / (len(text) - back)
        near = 0.8 if back == order else 0.5 if back % order else None
        if near:
            assert changed == pytest.approx(near, abs=0.02)


def test_markov_with_a_model_that_knows_the_order():
    assert markov.entropy(0.8) == pytest.approx(0.7219, abs=1e-4) and markov.entropy(1.0) == 0

    class Knows(Oracle):  # order 2 and the probability; nothing else
        def _score(self, text):
            nats = [math.log(0.5)] * 2
            nats += [math.log(0.2 if a == b else 0.8) for a, b in zip(text, text[2:])]
            return Score(text, np.array(nats, np.float32), np.zeros(len(text), bool))

    model = Knows()
    rows = markov.run(model, replace(SETTINGS, items=101))["markov"]
    assert [row["order"] for row in rows] == [1, 2, 3, 4]
    chains = model.seen[101:202]
    kept = [t[i - 2] == t[i] for t in chains for i in range(32, 64)]
    by_hand = np.mean([-math.log2(0.2 if same else 0.8) for same in kept])
    assert rows[1]["bits_per_symbol"] == pytest.approx(by_hand, rel=1e-5)
    assert rows[1]["found"] == pytest.approx(1, abs=0.15) and rows[0]["found"] < 0.1
    uniform = markov.run(UNIFORM, SETTINGS)["markov"]
    for row in uniform:
        found = [row[k] for k in ("bits_per_symbol", "entropy_rate", "over_rate", "found")]
        assert found == pytest.approx([8, 0.72193, 7.27807, -25.1733], rel=1e-4)


def test_wrong_solutions():
    rng = random.Random(1)
    assert consistency.mistake("coherent", rng)(7) == 8
    found = {consistency.mistake("contradictory", rng)(1000) - 1000 for _ in range(200)}
    assert len(found) == 10 and 0 not in found
    for x in (3, 40, -17, 999):
        wrong = [consistency.mistake("random", rng)(x) for _ in range(100)]
        assert x not in wrong and {len(str(w)) for w in wrong} == {len(str(abs(x)))}
    for right in consistency.make_pairs(SETTINGS):
        assert right.right != right.wrong and right.prompt.count(b"\n") == 2


def test_right_solutions_are_right():
    for pair in consistency.make_pairs(SETTINGS):
        question, text = pair.prompt.decode().split("\n")[-1], pair.right.decode().strip()
        match pair.tags["problem"]:
            case "chain":
                for step in text.split("; "):
                    left, right = step.split(" = ")
                    assert eval(left) == int(right)
                assert int(text.split(" = ")[-1]) == eval(question.strip(": "))
            case "equation":
                a, b, c = map(int, re.findall(r"\d+", question))
                x = int(text.split("x = ")[-1])
                assert a * x + b == c and text == f"{a} x = {a * x}; x = {x}"
            case "derivative":
                terms = [map(int, t) for t in re.findall(r"(\d+) x\^(\d+)", question)]
                assert text == " + ".join(f"{a * n} x^{n - 1}" for a, n in terms)


def test_consistency_with_models_whose_preference_is_known():
    pairs = consistency.make_pairs(SETTINGS)
    names = ("by_mean", "by_sum", "by_first_difference")
    right = Oracle({pair.prompt + pair.right for pair in pairs})
    wrong = Oracle({pair.prompt + pair.wrong for pair in pairs})
    for model, score in ((right, 1), (wrong, 0), (UNIFORM, None)):
        rows = consistency.run(model, SETTINGS)["consistency"]
        assert [row["pairs"] for row in rows] == [23] * 9
        for row in rows:
            if score is not None:
                assert [row[name] for name in names] == [score] * 3
            else:  # equally likely bytes: only the length of a solution counts
                assert row["by_mean"] == row["by_first_difference"] == 0.5
                assert row["nll_right"] == pytest.approx(math.log(256))
                own = [p for p in pairs if list(p.tags.values()) == [row["problem"], row["error"]]]
                sizes = [(len(p.right), len(p.wrong)) for p in own]
                shorter = [0.5 if a == b else float(a < b) for a, b in sizes]
                assert row["by_sum"] == pytest.approx(np.mean(shorter))


def test_the_first_difference_is_where_it_is_decided():
    class Reads(Oracle):  # nothing surprises it up to where a text leaves those that it knows
        def _score(self, text):
            known = max(len(os.path.commonprefix([text, k])) for k in self.known)
            nats = [0.0] * known + [-1.0] * (len(text) - known)
            return Score(text, np.array(nats, np.float32), np.zeros(len(text), bool))

    settings = replace(SETTINGS, items=3)
    pairs = consistency.make_pairs(settings)
    right = Reads({pair.prompt + pair.right for pair in pairs})
    wrong = Reads({pair.prompt + pair.wrong for pair in pairs})
    for model, score in ((right, 1), (wrong, 0)):
        rows = consistency.run(model, settings)["consistency"]
        assert [row["by_first_difference"] for row in rows] == [score] * 9


def test_a_wrong_chain_goes_on_from_what_is_written():
    question, solve = consistency.chain(random.Random(2))
    numbers = [int(n) for n in re.findall(r"\d+", solve(lambda x: 1000 - x))]
    assert numbers[2] == numbers[3] and numbers[5] == numbers[6]
    assert all(numbers[i + 2] > 900 or numbers[i + 2] < 100 for i in (0, 3, 6))


def test_stability_counts_flips():
    class Counts(Oracle):  # chunks of 5 from the start of the window
        def in_bfloat16(self):
            return Oracle(cut=lambda text: range(0, len(text), 10))

    settings = replace(SETTINGS, texts=(b"x" * 91, b"y" * 40))
    rows = stability.run(Counts(cut=lambda text: range(0, len(text), 5)), settings)["stability"]
    changes = {row["change"]: row for row in rows}
    assert list(changes) == ["window + 1", "window + 7", "window + 64", "bfloat16"]
    # bytes 5, 10, ... 90 and 6, 11, ... 86 of 89; 5, ... 35 and 6, ... 36 of 38
    assert changes["window + 1"]["flipped"] == (18 + 17 + 7 + 7) / (89 + 38)
    assert changes["window + 1"]["f1"] == 0
    # half of 18 and of 7 boundaries are left
    assert changes["bfloat16"]["flipped"] == (9 + 4) / (90 + 39)
    assert changes["bfloat16"]["f1"] == pytest.approx(2 * 12 / (25 + 12))
    # the longer text only: 65, 70 ... 90 against 69, 74, 79, 84, 89
    assert changes["window + 64"]["flipped"] == (6 + 5) / 26
    spaces = Oracle(cut=lambda text: [i for i, c in enumerate(text) if c == 32])
    for row in stability.run(spaces, SETTINGS)["stability"]:
        assert row["flipped"] == 0 and row["f1"] == 1 and row["boundaries"] > 50


def test_surprise_of_boundaries_before_what_surprises():
    class Surprised(Oracle):  # at each q only
        def _score(self, text):
            nats = np.array([-8.0 if c == ord("q") else 0.0 for c in text], np.float32)
            return Score(text, nats, nats == 0)

    text = b"abcqdefgqhijklqmn" * 3
    before = lambda text: [i - 1 for i, c in enumerate(text) if c == ord("q")]
    model = Surprised(cut=before)
    (row,) = surprise.run(model, replace(SETTINGS, texts=(text,)))["surprise"]
    mean = 9 * 8 / (len(text) - 1)
    assert row["stage"] == 0 and row["bq"] == pytest.approx(8 / mean)
    assert row["null_mean"] == pytest.approx(1, abs=0.1) and row["z"] > 2
    # an end is decided one byte before the next chunk starts
    ends = replace(model, alignments=("end",), cut=lambda text: [i + 1 for i in before(text)])
    assert surprise.run(ends, replace(SETTINGS, texts=(text,)))["surprise"] == [row]
    (row,) = surprise.run(Oracle(cut=before), replace(SETTINGS, texts=(text,)))["surprise"]
    assert row["bq"] is None  # nothing surprises


def test_fairness_of_made_up_languages():
    parallel = {"one": [b"aa", b"bbb"], "two": [b"aaaa", b"bbbbbb"], "six": [b"x" * 12, b"y" * 18]}
    report = fairness.run(Oracle(), replace(SETTINGS, parallel=parallel))
    (row,) = report["fairness"]
    # 2.5, 5 and 15 chunks of one byte per sentence: mean 7.5, differences 2.5, 10, 12.5
    assert row["max_over_min"] == 6
    assert row["cv"] == pytest.approx(math.sqrt((25 + 6.25 + 56.25) / 3) / 7.5)
    assert row["gini"] == pytest.approx(2 * (2.5 + 10 + 12.5) / 9 / 15)
    one = report["fairness by language"][0]
    assert one == {
        "language": "one", "sentences": 2, "bytes_per_sentence": 2.5, "bpb": 0.0,
        "chunks_per_sentence_0": 2.5,
    }  # fmt: skip
    uniform = fairness.run(UNIFORM, replace(SETTINGS, parallel=parallel))
    assert all(row["bpb"] == pytest.approx(8) for row in uniform["fairness by language"])
    same = fairness.run(Oracle(cut=lambda text: [0]), replace(SETTINGS, parallel=parallel))
    assert same["fairness"] == [{"stage": 0, "max_over_min": 1, "cv": 0, "gini": 0}]


@pytest.mark.parametrize("suite", [stability, surprise, fairness])
def test_what_cuts_nowhere_is_refused(suite):
    with pytest.raises(ConfigError, match="cuts nowhere"):
        suite.run(Oracle(alignments=()), SETTINGS)


# --- a model of ours ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> HNetLM:
    config = network(
        stage("t1 t1", 13), stage("t1 t1", 13, **MLP_END, dechunk="repeat", residual="add"),
        stage("t1", 13),
    )  # fmt: skip
    return nnx.merge(*random_params(config))


@pytest.mark.every
def test_a_model_is_asked_in_batches(model):
    calls = []
    scorer = ModelScorer(model, batch_size=2, progress=lambda *n: calls.append(n))
    assert scorer.alignments == ("start", "end")
    texts = [b"x" * n for n in (9, 2, 15, 1, 7)] * 4
    for ours, theirs in zip(scorer.score(texts), logprobs(model, texts, batch_size=2)):
        assert ours.data == theirs.data
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-5)
    assert calls == [(20, 0), (0, 16), (0, 4)]
    cut = scorer.boundaries(texts)
    assert [seg.data for seg in cut] == texts and {len(seg.stages) for seg in cut} == {2}
    half = scorer.in_bfloat16()
    assert half.model.config.compute.dtype == "bfloat16"
    same = jax.tree.map(np.array_equal, *(nnx.state(m, nnx.Param) for m in (model, half.model)))
    assert all(jax.tree.leaves(same))
    nats = [np.concatenate([s.logprobs for s in m.score(texts)]) for m in (scorer, half)]
    assert 0 < np.abs(nats[0] - nats[1]).max() < 0.5


def test_a_model_writes_up_to_a_newline():
    model = nnx.merge(*random_params(network(stage("t1", 13))))
    found = ModelScorer(model, batch_size=2).greedy([b"abc", b"xy"], 5)
    sampling = Sampling(max_bytes=5, temperature=0.0, stop=("\n",))
    assert found == [one.data for one in generate(model, [b"abc", b"xy"], sampling)]


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch, capsys):
    clock = iter(range(0, 1000, 40))
    monkeypatch.setattr(command.time, "monotonic", lambda: next(clock))
    told = command.Told("counting", command.Progress(disable=True), command.TaskID(0))
    told.bar.add_task("counting")
    for asked, done in ((30, 0), (0, 10), (0, 5), (0, 15)):
        told(asked, done)
    assert capsys.readouterr().err.splitlines() == [
        "counting: 10 of 30 texts asked so far, after 80 s; about 160 s are left for these",
        "counting: 30 of 30 texts asked so far, after 160 s; about 0 s are left for these",
    ]


def test_every_report_is_tables_and_json(monkeypatch, capsys):
    made = {}
    monkeypatch.setattr(command, "ModelScorer", lambda model, **how: made.update(how) or UNIFORM)
    parallel = {"a": [b"one", b"two"], "b": [b"ein", b"zwei"]}
    settings = replace(SETTINGS, items=2, shots=1, parallel=parallel)
    reports = command.run_suites(None, list(SUITES), settings, batch_size=8)
    assert list(reports) == list(SUITES) and made["batch_size"] == 8
    assert json.loads(json.dumps(reports, allow_nan=False)) == reports
    command.print_reports(reports)
    printed = capsys.readouterr().out
    for name, report in reports.items():
        assert name in report and all(report.values())
        assert all(re.search(rf"^ *{title} *$", printed, re.M) for title in report)


# --- the command ----------------------------------------------------------------------------------


def test_passages_are_spread_over_the_text_and_hold_whole_characters(tmp_path):
    (tmp_path / "a.txt").write_text("é" * 500)
    (tmp_path / "b.txt").write_text("abcdefghij" * 20)
    part = open_part((str(tmp_path / "*.txt"),))
    found = command.passages(part, Settings(items=6, max_bytes=31))
    assert [t.decode() for t in found[:5]] == ["é" * 15] * 5 and len(found) == 6
    assert found[5].decode() == "abcdefghij" * 3 + "a"
    few = command.passages(part, Settings(items=600, max_bytes=400))
    assert len(few) == 3 and max(map(len, few)) == 400
    with pytest.raises(ConfigError, match="give more text"):
        (tmp_path / "c").write_text("short")
        command.passages(open_part((str(tmp_path / "c"),)), Settings())


@pytest.mark.parametrize(
    "data, kept",
    [
        ("né".encode()[:2], b"n"), ("né".encode()[2:] + b"a", b"a"), ("né".encode(), "né".encode()),
        ("a€".encode()[:3], b"a"), ("a😀".encode()[:4], b"a"), (b"", b""), (b"ab\xff", b"ab"),
        (b"\x80\x80\x80\x80", b"\x80"),
    ],
)  # fmt: skip
def test_whole_characters(data, kept):
    assert command.whole_characters(data) == kept


@pytest.mark.parametrize(
    "names, fields, problem",
    [
        (["pertrub"], {}, "suite='pertrub' is unknown: use some of perturb, chars"),
        (["chars"], {"items": 0}, "items=0"),
        (["chars"], {"shots": -1}, "shots=-1"),
        (["chars"], {"max_bytes": 3}, "max_bytes=3"),
    ],
)
def test_bad_settings_are_named(names, fields, problem):
    with pytest.raises(ConfigError, match=problem):
        command.check(names, Settings(**fields))
