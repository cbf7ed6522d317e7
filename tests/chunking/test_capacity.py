"""The ladder of chunk slots, and the alarms for bad boundary rates."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.configs.au_net import au_net_3
from experiments.configs.megabyte import megabyte_3
from experiments.configs.systems import magnet
from hnet.chunking.slots import bucket
from hnet.train.alarms import PERSISTENCE, WINDOW, BoundaryAlarms, diagnose
from hnet.train.capacity import SHRINK_AFTER, WORTH, CapacitySchedule
from tests.training import TINY


@given(st.integers(8, 50_000), st.floats(0, 60_000))
def test_a_rung_holds_what_it_is_asked_for_up_to_the_length_without_much_more(length, slots):
    size = bucket(length, slots)
    assert min(slots, length) <= size <= length
    assert size <= max(1.07 * slots + 1, slots + 8)


def observed(ladder, *counts):
    for count in counts:
        ladder = ladder.observe((count,))
    return ladder


def test_a_run_of_a_known_rate_starts_with_its_slots():
    """Rows of 512 bytes in patches of 4 bytes, then of 4 patches; words of 5 bytes, then pairs;
    a learned rate has all slots."""
    start = CapacitySchedule.start(megabyte_3(), 512)
    assert (start.full, start.capacities) == ((512, 512), (144, 40))
    assert all(room >= -(-n // 4) for n, room in zip((512, 128), start.capacities))
    start = CapacitySchedule.start(au_net_3(), 512)
    assert (start.full, start.capacities) == ((512, 512), (208, 208))
    start = CapacitySchedule.start(magnet(), 512)
    assert start.full == start.capacities == (1024,)


def test_it_climbs_at_once_and_descends_with_patience():
    ladder = observed(CapacitySchedule((512,), (128,)), 100)
    assert ladder.capacities == (128,)
    ladder = observed(ladder, 127)
    assert ladder.capacities[0] > 128
    before = ladder.capacities
    ladder = observed(ladder, *[60] * (SHRINK_AFTER - 1))
    assert ladder.capacities == before  # 127 is still in the window
    assert observed(ladder, 60).capacities == (64,)


def test_one_low_count_changes_nothing():
    ladder = observed(CapacitySchedule((512,), (152,)), *[140] * SHRINK_AFTER)
    assert observed(ladder, 20).capacities == ladder.capacities == (152,)


def test_it_does_not_follow_counts_that_fall_step_by_step():
    """Each capacity is a compilation."""
    ladder, sizes = CapacitySchedule((4096,), (4096,)), set()
    for step in range(300):
        ladder = ladder.observe((max(1000, int(4096 * 0.99**step)),))
        sizes.add(ladder.capacities)
    assert len(sizes) <= 5 and ladder.capacities[0] <= 1.07 * 1000


@given(st.integers(0, 2**32 - 1), st.floats(0.005, 0.04))
def test_steady_counts_never_overflow_and_fill_their_slots(seed, deviation):
    rng = np.random.default_rng(seed)
    counts = np.round(1000 * (1 + deviation * np.clip(rng.normal(size=300), -3, 3))).astype(int)
    ladder = CapacitySchedule((4096,), (4096,))
    used = []
    for step, count in enumerate(counts.tolist()):
        assert count <= ladder.capacities[0]
        if step >= 2 * SHRINK_AFTER:
            used.append(count / ladder.capacities[0])
        ladder = ladder.observe((count,))
    # four standard deviations, as estimated from 30 counts (up to 1.35 times too large); guard and
    # rung; slots that are already few enough
    assert np.mean(used) >= WORTH / (1 + 4 * 1.35 * deviation) / 1.06


@given(st.lists(st.integers(1, 512), min_size=1, max_size=150))
def test_slowly_moving_counts_never_overflow(targets):
    """A count that grows by less than the guard per step always gets a slot."""
    count, ladder = 100.0, CapacitySchedule((512,), (128,))
    for target in targets:
        count = min(max(target, count / 1.019), count * 1.019, 512)
        assert int(count) <= ladder.capacities[0]
        ladder = ladder.observe((int(count),))


def test_it_starts_with_all_slots_and_leaves_them_after_its_patience():
    ladder = CapacitySchedule.start(TINY, 64, rows_sharing_slots=3)
    assert ladder.capacities == (192,)
    ladder = observed(ladder, *[40] * (SHRINK_AFTER - 1))
    assert ladder.capacities == (192,)
    assert observed(ladder, 40).capacities == (48,)


def test_slots_of_ends_and_of_inner_stages_are_counted_in():
    ends = replace(TINY.stages[0], chunking=magnet().stages[0].chunking)
    model = replace(TINY, stages=(ends, TINY.stages[0], TINY.stages[1]))
    assert CapacitySchedule.start(model, 64).capacities == (128, 128)


def test_a_ladder_read_back_from_json_goes_on_alike():
    ladder = CapacitySchedule((512, 512), (128, 48))
    for step in range(SHRINK_AFTER // 2):
        ladder = ladder.observe((50 + step, 20))
    content = json.loads(json.dumps(ladder.to_json()))
    again = CapacitySchedule((512, 512), (512, 512)).with_json(content)
    for _ in range(2 * SHRINK_AFTER):
        ladder, again = ladder.observe((60, 9)), again.observe((60, 9))
        assert ladder == again
    assert 60 < ladder.capacities[0] < 128


@given(st.data())
def test_slots_that_held_every_row_hold_them_however_they_are_shared(data):
    """Restored with other rows sharing slots: on other devices, or in other micro-batches."""
    rows, wanted = 48, data.draw(st.lists(st.integers(1, 64), min_size=48, max_size=48))
    divisors = st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24])

    def most(ladder):
        parts = np.reshape(wanted, (rows // ladder.stride, ladder.stride)).T
        return int(parts.reshape(-1, ladder.rows_sharing_slots).sum(axis=1).max())

    def ladder_of(rows_sharing_slots, stride):
        stride = stride if (rows // stride) % rows_sharing_slots == 0 else 1
        return CapacitySchedule.start(TINY, 64, rows_sharing_slots, stride)

    before, now = (ladder_of(data.draw(divisors), data.draw(st.sampled_from([1, 2]))) for _ in "ab")
    before = replace(before, capacities=(most(before),), recent=((most(before),),), since=3)
    restored = now.with_json(json.loads(json.dumps(before.to_json())))
    assert most(now) <= restored.capacities[0] <= now.full[0]
    same = (before.rows_sharing_slots, before.stride) == (now.rows_sharing_slots, now.stride)
    assert same == (restored == before) == (restored.recent != ())


def test_a_ladder_of_an_earlier_version_is_read_where_its_rows_are_known():
    content = {"capacities": [40], "recent": [[33]], "since": 2}
    assert CapacitySchedule.start(TINY, 64).with_json(content).capacities == (40,)
    packed = CapacitySchedule.start(TINY, 64, 8)
    assert packed.with_json(content) == packed


@pytest.mark.parametrize(
    ("rates", "alarm"),
    [
        ([0.97] * PERSISTENCE, {"all-boundary"}),
        ([0.97] * (PERSISTENCE - 1), set()),
        ([0.01] * PERSISTENCE, {"no-boundary"}),
        ([0.2] + [0.01] * (PERSISTENCE - 1), set()),
        ([0.6] * WINDOW, {"stuck"}),
        ([0.4 + 0.01 * i for i in range(WINDOW)], {"drift"}),
        ([0.6] * (WINDOW - 1), set()),
        ([0.24 + 0.0001 * i for i in range(WINDOW)], set()),
        ([0.25] * (WINDOW - 1) + [0.6], set()),  # a batch with many boundaries
    ],
)
def test_alarms_are_named(rates, alarm):
    assert diagnose(rates, [0.25] * len(rates)) == alarm


def test_an_alarm_is_said_once_until_it_was_absent():
    alarms = BoundaryAlarms((True, False), hold_from=PERSISTENCE)
    rates = [0.97] * (PERSISTENCE + 2) + [0.5] + [0.97] * PERSISTENCE
    said = [alarms.check(step, (rate, 0.5), (0.25, 0.5)) for step, rate in enumerate(rates)]
    assert [step for step, lines in enumerate(said) if lines] == [PERSISTENCE - 1, len(rates) - 1]
    assert "'all-boundary' at stage 0" in said[-1][0] and "rate_control.gain" in said[-1][0]
    assert "it is held from step 21 on" in said[PERSISTENCE - 1][0]
    said = [alarms.check(step, (0.25, 0.97), (0.25, 0.5)) for step in range(PERSISTENCE)][-1]
    assert "'all-boundary' at stage 1" in said[0] and "chunking.losses" in said[0]


def test_a_mix_of_routes_that_moves_its_target_is_no_drift():
    targets = [0.1 + 0.004 * i for i in range(WINDOW)]
    assert diagnose([1.2 * target for target in targets], targets) == set()
    assert diagnose([1.2 * target for target in targets], [0.1] * WINDOW) == {"drift"}
