"""Faults planted in the network, each of which tests/parts/test_combinations.py must see."""

import pytest

import hnet.stage
from hnet.chunking.boundaries import decide
from hnet.chunking.part import BoundaryPredictor, Pool
from hnet.chunking.slots import open_slots
from hnet.chunking.table import DECHUNKS, POOLS, PREDICTORS
from tests.parts.test_combinations import TRIPLES, choices_of, few
from tests.parts.test_combinations import test_triple as check_triple

PARTS = {
    "predictor": (0, PREDICTORS, BoundaryPredictor),
    "pool": (2, POOLS, Pool),
    "dechunk": (3, DECHUNKS, None),
}
# of which a stream keeps nothing, in the case of `linear` with its defaults
STATELESS = ("dechunk at_boundaries", "dechunk cross_attention", "pool linear")


def forgetful() -> list[str]:
    """`FIELD TRIPLE` for each part with state in a stream, and one triple that has it."""
    found = []
    for field, (index, table, base) in PARTS.items():
        for name in table.names:
            with_it = [t for t in [*few(choices_of), *TRIPLES] if t.split()[index] == name]
            with_it.sort(key=lambda t: " end-" not in t)  # some pools need state for ends only
            stateless = f"{field} {name}" in STATELESS
            stateless |= base is not None and table.find(name).init is base.init
            if with_it and not stateless:
                found.append(f"{field} {with_it[0]}")
    return found


FORGETFUL = forgetful()
A_TRIPLE = {
    "boundaries -1": "fixed start select at_boundaries",
    "boundaries +1": "words end-learned mean repeat",
    "slots -1": "words end-learned mean repeat",  # one slot too many would change nothing
}


@pytest.mark.few("fault", FORGETFUL[:1], FORGETFUL)
def test_a_part_that_forgets_its_state(fault, monkeypatch):
    field, triple = fault.split(maxsplit=1)
    step = hnet.stage.HNet.step

    def forgetful(self, x_BD, active_B, cache, *rest, **more):
        *found, new = step(self, x_BD, active_B, cache, *rest, **more)
        return *found, new._replace(**{field: getattr(cache, field)})

    monkeypatch.setattr(hnet.stage.HNet, "step", forgetful)
    with pytest.raises(AssertionError):
        check_triple(triple)


@pytest.mark.few("fault", [*A_TRIPLE][:1], [*A_TRIPLE])
def test_a_capacity_off_by_one(fault, monkeypatch):
    place, change = fault.split()
    name, function = {"boundaries": ("decide", decide), "slots": ("open_slots", open_slots)}[place]

    def off_by_one(what, context, capacity, **more):
        return function(what, context, capacity + int(change), **more)

    monkeypatch.setattr(hnet.stage, name, off_by_one)
    with pytest.raises(AssertionError):
        check_triple(A_TRIPLE[fault])
