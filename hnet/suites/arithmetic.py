"""Addition with digits grouped in different ways (arXiv 2402.14903), and boundaries in numbers.

Groups of three are counted from the left (l2r) or from the right (r2l) and separated by a comma or
a space. The examples before a question have numbers of the same lengths as the question.
"""

import random
from collections.abc import Sequence

from hnet.suites.items import Item, Report, Row, Settings, ask, by_tags, with_shots
from hnet.suites.scorer import Scorer

LENGTHS = ((2, 2, 2), (3, 3, 3), (3, 3, 4), (5, 5, 5), (7, 7, 7), (7, 7, 8))
"""numbers of digits of a, b and a + b"""
FORMATS = {
    "nosep": ("", "r2l"),
    "comma_l2r": (",", "l2r"),
    "comma_r2l": (",", "r2l"),
    "space_l2r": (" ", "l2r"),
    "space_r2l": (" ", "r2l"),
}


def grouped(number: int, form: str) -> str:
    """1234567 -> 123,456,7 from the left, 1,234,567 from the right."""
    separator, direction = FORMATS[form]
    digits = str(number)
    first = len(digits) % 3 if direction == "r2l" else 0
    starts = [0] * bool(first) + list(range(first, len(digits), 3))
    return separator.join(digits[a:b] for a, b in zip(starts, [*starts[1:], len(digits)]))


def make(rng: random.Random, form: str, lengths: tuple[int, int, int]) -> tuple[str, str, Row]:
    while True:
        a, b = (rng.randrange(10 ** (n - 1), 10**n) for n in lengths[:2])
        if len(str(a + b)) == lengths[2]:
            break
    tags = {"format": form, "digits": "+".join(map(str, lengths[:2])) + f"={lengths[2]}"}
    return f"{grouped(a, form)}+{grouped(b, form)}=", grouped(a + b, form), tags


def make_items(settings: Settings) -> list[Item]:
    count = -(-settings.items // len(LENGTHS))
    items = []
    for form in FORMATS:
        for lengths in LENGTHS:
            key = f"arithmetic {form} {lengths}"
            each = lambda rng, f=form, n=lengths: make(rng, f, n)
            items += with_shots(each, settings, key, count)
    return items


def run(scorer: Scorer, settings: Settings) -> Report:
    items = make_items(settings)
    answers = ask(scorer, items)
    report = {
        "arithmetic": by_tags(answers, "format"),
        "arithmetic by length": by_tags(answers, "format", "digits"),
        "arithmetic errors": errors(scorer, items),
    }
    if scorer.alignments:
        report["arithmetic boundaries"] = boundary_rates(scorer, items)
    return report


def errors(scorer: Scorer, items: Sequence[Item]) -> list[Row]:
    """Errors of greedy decoding: share of answers with the right length, and among these the share
    of wrong digits by place from the left (1 = first)."""
    longest = max(len(item.answer) for item in items) + 2
    written = scorer.greedy([item.prompt for item in items], longest)
    rows = []
    for form in FORMATS:
        pairs = [
            (_digits(item.answer), _digits(text))
            for item, text in zip(items, written)
            if item.tags["format"] == form
        ]
        if not pairs:
            continue
        same = [(right, found) for right, found in pairs if len(right) == len(found)]
        row: Row = {"format": form, "right_length": len(same) / len(pairs)}
        for place in range(max(len(right) for right, _ in pairs)):
            own = [(r[place], f[place]) for r, f in same if len(r) > place]
            row[f"wrong_{place + 1}"] = sum(r != f for r, f in own) / len(own) if own else None
        rows.append(row)
    return rows


def _digits(text: bytes) -> str:
    return "".join(c for c in text.decode("utf-8", "replace") if c in "0123456789")


def boundary_rates(scorer: Scorer, items: Sequence[Item]) -> list[Row]:
    """Share of digits inside numbers without separators at which a chunk starts, by the digit's
    index from the right modulo 3: groups of three from the right start at index 2."""
    plain = [item for item in items if item.tags["format"] == "nosep"]
    found = scorer.boundaries([item.prompt + item.answer for item in plain])
    rows = []
    for stage in range(len(scorer.alignments)):
        count, starts = [0] * 3, [0] * 3
        for seg in found:
            cut = set(seg.stages[stage].starts)
            for first, end in numbers(seg.data):
                for i in range(first + 1, end):  # the start of a number says nothing about grouping
                    count[(end - 1 - i) % 3] += 1
                    starts[(end - 1 - i) % 3] += i in cut
        shares = {
            f"from_right_{k}": s / n if n else None for k, (s, n) in enumerate(zip(starts, count))
        }
        rows.append({"stage": stage, **shares})
    return rows


def numbers(text: bytes) -> list[tuple[int, int]]:
    """[start, end) of each run of digits."""
    edges = [
        i for i in range(len(text) + 1) if text[i - 1 : i].isdigit() != text[i : i + 1].isdigit()
    ]
    return list(zip(edges[::2], edges[1::2]))
