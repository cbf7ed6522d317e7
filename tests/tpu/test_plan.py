"""Plans for slices without having them: the compiler's text, the roofline, four topologies."""

import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.configs.published import MESHES
from hnet.config import PUBLISHED
from hnet.errors import ConfigError
from hnet.flops import param_counts
from hnet.outputs import lock
from hnet.train.capacity import SHRINK_AFTER, CapacitySchedule
from hnet.train.named import run_config
from hnet.train.sharding import check_batch
from tests.networks import optimized_jit
from tpu import hlo, published
from tpu.aot import FULLEST, Plan, _refused_bytes, capacities, compile_plan
from tpu.chips import CHIPS, GIB, Slice, open_slice
from tpu.plan import advice, alternatives, main, search
from tpu.roofline import (
    Bound,
    bytes_per_second,
    memory,
    report,
    roofline,
    size,
    step_bound,
    step_seconds,
)

TINY = {
    "arch_layout": ["t1", ["t1"], "t1"], "d_model": [32, 64], "d_intermediate": [0, 0],
    "attn_cfg": {"num_heads": [2, 2], "rotary_emb_dim": [8, 16], "window_size": [31, -1]},
}  # fmt: skip


@pytest.fixture
def tiny(tmp_path):
    """Command-line words of a job that compiles in seconds."""
    file = tmp_path / "tiny.json"
    file.write_text(json.dumps(TINY))
    return [str(file), "--data.seq_len", "128", "--data.batch_size", "64"]


TPU = SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")
GPU = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3")


# --- the compiler's text ------------------------------------------------------------------------

PROGRAM = """\
HloModule step, is_scheduled=true, num_partitions=4

%slice_of (param_0.1: f32[8,16,32], param_1.1: s32[]) -> f32[16,32] {
  %param_0.1 = f32[8,16,32]{2,1,0:T(8,128)} parameter(0)
  %param_1.1 = s32[]{:T(128)} parameter(1)
  %zero.1 = s32[]{:T(128)} constant(0)
  %slice.1 = f32[1,16,32]{2,1,0} dynamic-slice(%param_0.1, %param_1.1, %zero.1, %zero.1)
  ROOT %flat.1 = f32[16,32]{1,0} bitcast(%slice.1)
}

%body (arg: (s32[], f32[8,16,32], f32[16,32])) -> (s32[], f32[8,16,32], f32[16,32]) {
  %arg = (s32[]{:T(128)}, f32[8,16,32]{2,1,0:T(8,128)}, /*index=2*/f32[16,32]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %stack = f32[8,16,32]{2,1,0:T(8,128)} get-tuple-element(%arg), index=1
  %x = f32[16,32]{1,0} get-tuple-element(%arg), index=2
  %weights = f32[16,32]{1,0:T(8,128)S(1)} fusion(%stack, %i), kind=kLoop, calls=%slice_of
  %sum = f32[16,32]{1,0} add(%x, %weights), metadata={op_name="jit(f)/jvp(stage1)/main_network/add"}
  %all = f32[16,32]{1,0} all-reduce(%sum), channel_id=1, replica_groups=mesh['a'=2,'b'=2] {'b'}, to_apply=%plus, metadata={op_name="jit(f)/transpose(jvp(stage1))/main_network/dot"}
  ROOT %out = (s32[], f32[8,16,32], f32[16,32]) tuple(%i, %stack, %all)
}

%plus (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

%condition (arg.2: (s32[], f32[8,16,32], f32[16,32])) -> pred[] {
  %arg.2 = (s32[], f32[8,16,32], f32[16,32]) parameter(0)
  %i.2 = s32[] get-tuple-element(%arg.2), index=0
  %n = s32[]{:T(128)} constant(8)
  ROOT %less = pred[]{:T(512)} compare(%i.2, %n), direction=LT
}

ENTRY %main (p0: f32[8,16,32], p1: bf16[64,32]) -> f32[16,32] {
  %p0 = f32[8,16,32]{2,1,0:T(8,128)} parameter(0)
  %p1 = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(1)
  %copy-start.1 = (bf16[64,32]{1,0:T(8,128)(2,1)S(1)}, bf16[64,32]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%p1)
  %copy-done.1 = bf16[64,32]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start.1)
  %x0 = f32[16,32]{1,0} custom-call(%copy-done.1), metadata={op_name="jit(f)/jvp(encoder)/dot"}
  %start = s32[] constant(0)
  %carry = (s32[], f32[8,16,32], f32[16,32]) tuple(%start, %p0, %x0)
  %loop = (s32[], f32[8,16,32], f32[16,32]) while(%carry), condition=%condition, body=%body
  %gather = f32[64,32]{1,0} all-gather(%x0), replica_groups=[1,4]<=[4], dimensions={0}, metadata={op_name="jit(f)/lm_head/dot"}
  ROOT %end = f32[16,32]{1,0} get-tuple-element(%loop), index=2
}
"""  # noqa: E501


def test_loops_count_as_often_as_they_run_and_slices_as_slices():
    array = 16 * 32 * 4
    by = {(m.kind, m.part): m for m in hlo.moved(PROGRAM)}
    # 8 times: read a weight and its index into on-chip memory; read two operands (one is already
    # there) and write; all-reduce over the two devices of axis b
    reads_and_writes = sum(
        m.num_bytes
        for m in hlo.moved(PROGRAM)
        if m.kind == "hbm" and m.part == "stage1/main_network"
    )
    assert reads_and_writes == 8 * (array + 4 + 2 * array)
    reduce = by["all-reduce", "stage1/main_network"]
    assert (reduce.num_bytes, reduce.count, reduce.group) == (8 * array, 8, 2)
    gather = by["all-gather", "lm_head"]
    assert (gather.num_bytes, gather.count, gather.group) == (3 * array, 1, 4)
    # a prefetch without a name belongs to its user
    encoder = sum(m.num_bytes for m in hlo.moved(PROGRAM) if m.part == "stage0/encoder")
    assert encoder == 64 * 32 * 2 + array


SLICED = """\
HloModule step, is_scheduled=true

%third (p: bf16[16,48]) -> bf16[16,16] {
  %p = bf16[16,48]{1,0} parameter(0)
  ROOT %s = bf16[16,16]{1,0} slice(%p), slice={[0:16], [16:32]}
}

ENTRY %main (a: bf16[16,48]) -> bf16[16,16] {
  %a = bf16[16,48]{1,0} parameter(0)
  ROOT %f = bf16[16,16]{1,0} fusion(%a), kind=kLoop, calls=%third
}
"""


def test_a_kernel_that_reads_a_slice_of_an_array_counts_the_slice():
    assert [m.num_bytes for m in hlo.moved(SLICED)] == [2 * 16 * 16 * 2]


BRANCHES = """\
HloModule step, is_scheduled=true

%nothing (q: f32[16]) -> f32[16] {
  ROOT %q = f32[16]{0} parameter(0)
}

%twice (p: f32[16]) -> f32[16] {
  %p = f32[16]{0} parameter(0)
  ROOT %s = f32[16]{0} add(%p, %p)
}

ENTRY %main (a: f32[16], b: pred[]) -> f32[16] {
  %a = f32[16]{0} parameter(0)
  %b = pred[] parameter(1)
  ROOT %c = f32[16]{0} conditional(%b, %a, %a), true_computation=%twice, false_computation=%nothing, metadata={op_name="jit(f)/SCOPE/cond"}
}
"""  # noqa: E501


@pytest.mark.parametrize("scope, counted", [("optimizer", [3 * 16 * 4]), ("rarely", [])])
def test_what_runs_rarely_does_not_count(scope, counted):
    assert [m.num_bytes for m in hlo.moved(BRANCHES.replace("SCOPE", scope))] == counted


SPREAD = """\
HloModule step, is_scheduled=true, num_partitions=4

%all-reduce-scatter.1 (input: bf16[8,32]) -> bf16[2,32] {
  %input = bf16[8,32]{1,0} parameter(0)
  %all-reduce.1 = bf16[8,32]{1,0} all-reduce(%input), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%plus
  %id = u32[] partition-id()
  %zero = u32[] constant(0)
  ROOT %slice = bf16[2,32]{1,0} dynamic-slice(%all-reduce.1, %id, %zero), dynamic_slice_sizes={2,32}
}

%async_start (p: bf16[4,32]) -> (bf16[4,32], bf16[16,32]) {
  %p = bf16[4,32]{1,0} parameter(0)
  %all-gather.1 = bf16[16,32]{1,0} all-gather(%p), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_end":"-1"}}
  ROOT %begin = (bf16[4,32]{1,0}, bf16[16,32]{1,0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_done (q: bf16[4,32]) -> bf16[16,32] {
  %q = bf16[4,32]{1,0} parameter(0)
  %all-gather.2 = bf16[16,32]{1,0} all-gather(%q), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_end":"-1"}}
  ROOT %end = bf16[16,32]{1,0} custom-call(%all-gather.2), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (g: bf16[8,32], w: bf16[4,32]) -> bf16[2,32] {
  %g = bf16[8,32]{1,0} parameter(0)
  %w = bf16[4,32]{1,0} parameter(1)
  %start = (bf16[4,32]{1,0}, bf16[16,32]{1,0}) fusion(%w), kind=kCustom, calls=%async_start, metadata={op_name="jit(f)/jvp(encoder)/dot"}
  %own = bf16[4,32]{1,0} get-tuple-element(%start), index=0
  %done = bf16[16,32]{1,0} fusion(%own), kind=kCustom, calls=%async_done, metadata={op_name="jit(f)/jvp(encoder)/dot"}
  ROOT %sum = bf16[2,32]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1, metadata={op_name="jit(f)/transpose(jvp(decoder))/dot"}
}
"""  # noqa: E501


def test_a_collective_spread_over_fusions_counts_once_and_a_sliced_sum_is_a_scatter():
    sent = [m for m in hlo.moved(SPREAD) if m.kind != "hbm"]
    assert sent == [
        hlo.Traffic("all-gather", "stage0/encoder", 3 * 4 * 32 * 2, 1, 4, 4),
        hlo.Traffic("reduce-scatter", "stage0/decoder", 3 / 4 * 8 * 32 * 2, 1, 4, 4),
    ]


def test_a_compiled_program_moves_what_it_was_told_to():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])

    def five_sums_and_a_gather(a_NK):
        def one(a_NK, _):
            return jax.lax.psum(jnp.sin(a_NK), "x"), None

        a_NK, _ = jax.lax.scan(one, a_NK, length=5)
        return jax.lax.all_gather(a_NK, "x")

    sharded = jax.shard_map(
        five_sums_and_a_gather, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=False
    )
    array = jax.ShapeDtypeStruct((12, 7), jnp.float32, sharding=NamedSharding(mesh, P("x")))
    sent = hlo.moved(optimized_jit(sharded).lower(array).compile().as_text())
    totals = {m.kind: (m.num_bytes, m.count, m.group) for m in sent if m.kind != "hbm"}
    assert totals == {
        "all-reduce": (5 * 2 * 3 / 4 * 3 * 7 * 4, 5, 4),
        "all-gather": (3 * 3 * 7 * 4, 1, 4),
    }


@pytest.mark.parametrize(
    "attributes, group, span",
    [
        ("replica_groups={{0,3},{1,2}}, to_apply=%plus", 2, 4),
        ("replica_groups=[2,3]<=[6]", 3, 3),
        ("replica_groups=[3,2]<=[2,3]T(1,0)", 2, 4),
        ("replica_groups=mesh['a'=2,'b'=3] {'b'}, x", 3, 3),
        ("replica_groups=mesh['a'=2,'b'=3] {'a'}, x", 2, 4),
        ("replica_groups=mesh['a'=3,'b'=1,'c'=2], device_ids=([2,3]T(1,0)) {'a'}", 3, 3),
        ("replica_groups=mesh['a'=3,'b'=2], device_ids=([2,3]T(1,0)) {'b'}", 2, 4),
        ("channel_id=1, source_target_pairs={{0,5},{5,0}}", 2, 6),
    ],
)
def test_devices_of_a_collective(attributes, group, span):
    assert hlo._group(attributes) == (group, span)


def test_devices_of_an_unknown_form_are_refused():
    with pytest.raises(ValueError, match="unknown form"):
        hlo._group("replica_groups=everyone")


@pytest.mark.parametrize(
    "shape, everything, hbm",
    [
        ("f32[3,5]{1,0:T(8,128)}", 60, 60),
        ("bf16[7]{0:T(256)(2,1)S(1)}", 14, 0),
        ("(f32[2]{0}, /*index=1*/s8[3]{0:S(1)}, pred[])", 12, 9),
        ("u32[]{:S(2)}", 4, 0),
    ],
)
def test_shape_bytes(shape, everything, hbm):
    assert hlo.shape_bytes(shape) == everything
    assert hlo.shape_bytes(shape, hbm_only=True) == hbm


@pytest.mark.parametrize(
    "scopes, part",
    [
        ("jit(train_step)/jvp(encoder)/while/body/dot_general", "stage0/encoder"),
        ("jit(f)/transpose(jvp(stage1))/checkpoint/decoder/mul", "stage1/decoder"),
        ("jit(f)/jvp(stage1)/stage2/main_network/add", "stage2/main_network"),
        ("jit(f)/jvp(routing_module)/dot", "stage0/routing_module"),
        ("jit(f)/jvp(lm_head)/dot", "lm_head"),
        ("jit(f)/optimizer/mul", "optimizer"),
        ("jit(f)/broadcast", "other"),
    ],
)
def test_part_of(scopes, part):
    assert hlo.part_of(scopes) == part


# --- settings -----------------------------------------------------------------------------------


def test_capacities_are_those_of_the_ladder():
    config = run_config(["2stage_L", "--data.seq_len", "8192"])
    ladder = CapacitySchedule.start(config.model, 8192)
    assert capacities(config) == ladder.capacities  # training starts with these
    for _ in range(SHRINK_AFTER):
        ladder = ladder.observe((math.ceil(FULLEST * 8192 / 3), math.ceil(FULLEST * 8192 / 9)))
    assert capacities(config, 1.0) == ladder.capacities
    assert capacities(config, 100.0) == (8192, 8192)


def test_alternatives_keep_the_updates_as_long_as_they_can(tiny):
    config = run_config(tiny)
    options = alternatives(config, 16)
    assert len(options) == len(set(options)) > 60
    for one in options[::11]:
        other = run_config([*tiny, *one.options(config)])
        assert other.optim == config.optim
        assert other.data.batch_size == 64 >> one.halvings
        axes = {"data": 16 // other.mesh.fsdp, "fsdp": other.mesh.fsdp}
        mesh = type("Mesh", (), {"shape": axes})
        check_batch(other.data.batch_size, other.train.accumulate, mesh)
    assert options[0] == (0, 0, 1, 1)  # the fastest
    halvings = [one.halvings for one in options]
    assert halvings == sorted(halvings) and set(halvings) == {0, 1, 2}


def test_published_models_have_the_published_recipe():
    config = run_config(["1stage_XL", "--data.batch_size", "64"])
    assert config.model.stages[1].d_model == 2048
    assert (config.data.batch_size, config.data.seq_len) == (64, 8192)
    assert config.model.compute.dtype == "bfloat16" and config.optim.learning_rate == 5e-4


@pytest.mark.parametrize("machine", MESHES)
def test_published_models_have_settings_for_two_machines(machine):
    devices = {"v5p:4x4x4": 64, "h100:8": 8}[machine]
    for name in PUBLISHED:
        config = run_config([name, *MESHES[machine].split()])
        assert config.data.batch_size % (devices * config.train.accumulate) == 0
        assert devices % config.mesh.fsdp == 0 and config.mesh.data == -1


def made_up(config, **fields):
    slice_ = Slice("v5e:2x2", CHIPS["v5e"], [TPU] * 4)
    base = Plan(config, slice_, capacities(config, 1.0), 1.0, 2 * GIB, 10 * GIB, True, [])
    return replace(base, **fields)


def test_roofline_takes_the_slowest_resource(tiny):
    plan = made_up(
        run_config(tiny),
        moved=[
            hlo.Traffic("hbm", "stage0/encoder", 8.19e8, 1),
            hlo.Traffic("all-reduce", "stage0/encoder", 9e8, 1, 4),
            hlo.Traffic("hbm", "optimizer", 8.19e9, 1),
        ],
    )
    bounds = roofline(plan)
    assert bounds["stage0/encoder"].hbm == pytest.approx(1e-3)
    assert bounds["stage0/encoder"].network == pytest.approx(9e-3)  # two axes of one link each
    assert bounds["stage0/encoder"].name == "network"
    assert bounds["optimizer"] == Bound(0, pytest.approx(1e-2), 0, 0)
    # lm_head: 3 x 2 x 128 positions x 256 x 32 for each of the 16 rows of a device
    assert bounds["lm_head"].compute == pytest.approx(3 * 2 * 128 * 256 * 32 * 16 / 197e12)
    assert step_seconds(plan) == pytest.approx(sum(max(b) for b in bounds.values()))
    assert bytes_per_second(plan) == pytest.approx(64 * 128 / step_seconds(plan))
    assert step_bound(plan) == "hbm"
    assert "mostly bound by hbm" in report(plan)
    assert re.search(r"0 +0  -\n", report(made_up(run_config(tiny))))


def test_rows_that_share_slots_attend_over_all_of_them(tiny):
    separate = roofline(made_up(run_config(tiny), capacities=(24,)))
    shared = roofline(made_up(run_config(tiny), capacities=(24,), rows_sharing_slots=4))
    # 96 x 96 scores for four rows; two operations per channel, three times plus one recomputation
    more = (96 * 96 / 4 - 24 * 24) * 2 * 64 * (4 + 3) * 16 / 197e12
    main = "stage1/main_network"
    assert shared[main].compute - separate[main].compute == pytest.approx(more)
    # smoothing runs over blocks of the shared slots; everything else is unchanged
    nothing = Bound(0.0, 0.0, 0, 0.0)
    changed = {part for part in shared if shared[part] != separate.get(part, nothing)}
    assert separate.keys() <= shared.keys() and changed == {main, "stage0/dechunk"}


@pytest.mark.parametrize(
    "name, num_devices, group, links",
    [
        ("v5e:2x2", 4, 2, 1),  # a line of two
        ("v5e:8x8", 64, 8, 1),
        ("v5e:8x8", 64, 64, 2),  # along both axes
        ("v5e:16x16", 256, 16, 2),  # a ring: both ways
        ("v5p:4x4x4", 64, 4, 2),
        ("v5p:4x4x4", 64, 16, 4),
        ("v5p:4x4x4", 64, 64, 6),
        ("v5p:2x2x4", 16, 16, 3),  # not a multiple of a cube: no rings
        ("tpu7x:2x2x1", 8, 2, 0.5),  # two devices per chip share its links
        ("h100:8", 8, 8, 1),
        ("h100:4x8", 32, 8, 1),  # one host
    ],
)
def test_links_of_a_collective(name, num_devices, group, links):
    chip = CHIPS[name.split(":")[0]]
    rate = Slice(name, chip, [None] * num_devices).network_rate(group)
    assert rate == pytest.approx(links * chip.link_rate)


def test_a_ring_over_hosts_is_as_slow_as_their_network():
    slice_ = Slice("h100:4x8", CHIPS["h100"], [None] * 32)
    assert slice_.network_rate(4, 4) == CHIPS["h100"].link_rate
    assert slice_.network_rate(32) == slice_.network_rate(4, 25) == CHIPS["h100"].host_rate


def test_small_kernels_bound_a_part_on_a_gpu_only(tiny):
    moved = [hlo.Traffic("hbm", "stage0/encoder", 1e3, 5000.0)]
    plan = made_up(run_config(tiny), moved=moved)
    assert roofline(plan)["stage0/encoder"].launches == 0
    gpu = replace(plan, slice_=Slice("h100:4", CHIPS["h100"], [None] * 4))
    assert roofline(gpu)["stage0/encoder"].launches == pytest.approx(5000 * 2e-6)
    assert step_bound(gpu) == "launches" and "kernels" in report(gpu)


def test_advice_and_report_of_what_does_not_fit(tiny):
    config = run_config(tiny)
    plan = made_up(config, state_bytes=40 * GIB, hbm_bytes=math.inf, fits=False)
    assert "--mesh.fsdp 4 or more" in advice(plan)
    assert "DOES NOT FIT" in memory(plan)
    assert "--model.compute.remat layer" in advice(replace(plan, state_bytes=GIB))
    assert size(1536) == "1.5 KiB" and size(3 * GIB) == "3.00 GiB" and size(math.inf) == "inf GiB"


def faked(plan, tried, fits, seconds):
    """A `compile_plan` with given rules: what fits, and seconds per step at the expected slots."""

    def compiled(config, slice_, slots, *, to_code=False):
        assert not to_code
        if slots == plan.capacities:
            tried.append(config)
            return replace(plan, config=config, fits=fits(config), hbm_bytes=GIB)
        moved = [hlo.Traffic("hbm", "optimizer", seconds(config) * 8.19e11, 1)]
        return replace(plan, config=config, capacities=slots, moved=moved)

    return compiled


def test_search_finds_the_fastest_that_fits(tiny, monkeypatch, capsys):
    config = run_config(tiny)  # 64 rows on 4 devices
    plan = made_up(config, capacities=(128,), state_bytes=40 * GIB, fits=False)  # fsdp of 4 or more
    tried = []
    # recomputing everything and micro-batches are slow in this test
    seconds = lambda c: (
        {"none": 1, "dots": 1.1, "layer": 9}[c.model.compute.remat]
        * (c.train.accumulate**0.5 + (c.model.compute.ssd_block_len or 64) / 1e4)
    )

    def find(limit, fits):
        tried.clear()
        monkeypatch.setattr("tpu.plan.compile_plan", faked(plan, tried, fits, seconds))
        found = search(plan, 1.0, limit)
        tries = capsys.readouterr().out
        assert tries.count(", fits") + tries.count("too much") == len(tried) <= limit
        assert all(c.mesh.fsdp == 4 for c in tried)
        return found and found.config

    # the least memory is tried first; the best recomputes only products, though the rest also fits
    found = find(12, lambda c: c.model.compute.remat != "none")
    assert (found.model.compute.remat, found.train.accumulate) == ("dots", 1)
    assert (tried[0].model.compute.remat, tried[0].train.accumulate) == ("layer", 16)
    # settings that save more than some that fit, or less than some that do not fit, are not tried
    assert [c.train.accumulate for c in tried if c.model.compute.remat == "dots"] == [1]
    # one that fits within the limit of tries is better than none
    assert find(1, lambda c: c.train.accumulate == 16).train.accumulate == 16
    # only half the batch fits: one try with the whole batch is enough
    found = find(12, lambda c: c.data.batch_size == 32)
    assert found.data.batch_size == 32 and [c.data.batch_size for c in tried].count(64) == 1
    assert find(12, lambda c: False) is None and len(tried) == 3


def test_search_goes_on_from_settings_that_fit_and_varies_blocks_of_array_code(tiny, monkeypatch):
    slice_ = Slice("h100:4", CHIPS["h100"], [GPU] * 4)
    plan = made_up(run_config(tiny), slice_=slice_, capacities=(128,))
    seconds = lambda c: abs((c.model.compute.ssd_block_len or 64) - 256) + 1.0 + c.train.accumulate
    tried = []
    monkeypatch.setattr("tpu.plan.compile_plan", faked(plan, tried, lambda c: True, seconds))
    found = search(plan, 1.0, 30)
    assert found.config.model.compute.ssd_block_len == 256 and found.config.train.accumulate == 1


def test_the_published_table_takes_the_fastest_remat_with_the_fewest_micro_batches_and_goes_on(
    tmp_path, monkeypatch, capsys
):
    tried = []
    expected = capacities(run_config(["1stage_L", "--data.seq_len", "8192"]), 1.0)

    def compiled(config, slice_, slots, *, to_code):
        remat, accumulate = config.model.compute.remat, config.train.accumulate
        tried.append((remat, accumulate, slots))
        assert not to_code and (config.data.batch_size, config.mesh.fsdp) == (256, 16)
        needed = {"none": 200, "dots": 14, "layer": 3}[remat] * 4 * GIB / accumulate
        rate = {"none": 1, "dots": 0.5, "layer": 0.75}[remat]
        moved = [hlo.Traffic("hbm", "stage0/encoder", rate * 8.19e11, 1)]
        fits = GIB + needed <= 16 * GIB
        return Plan(config, slice_, slots, None, GIB, GIB + needed, fits, moved)

    monkeypatch.setattr(published, "compile_plan", compiled)
    monkeypatch.setattr(
        published, "open_slice", lambda name: Slice(name, CHIPS["v5e"], [None] * 64)
    )
    words = ["--topology", "v5e:8x8", "--out", str(tmp_path / "rows.jsonl"), "--model"]
    assert published.main([*words, "1stage_L"]) == 0
    assert tried == [
        ("none", 1, (8192,)),
        ("none", 4, (8192,)),  # 64 times what fits, but a device has only 4 rows
        ("dots", 1, (8192,)),
        ("dots", 4, (8192,)),
        ("layer", 1, (8192,)),
        ("dots", 4, expected),
        ("layer", 1, expected),
    ]
    row = capsys.readouterr().out.splitlines()[-1]
    start = "| 1stage_L | 679M | v5e:8x8 | dots | 4 | 15.0 | 15.0 | 16 | yes | 1 | 12.5 | hbm | "
    assert row.startswith(start) and row.count("|") == published.HEAD.splitlines()[0].count("|")

    tried.clear()
    assert published.main([*words, "1stage_L"]) == 0 and not tried
    assert capsys.readouterr().out.splitlines()[-1] == row
    torn, file = tmp_path / "rows.jsonl", (tmp_path / "rows.jsonl").read_bytes()
    for rest in (b"", file[:1], file[:40], file[:-1], b"[1]\n", b'{"mine": 1}'):
        torn.write_bytes(rest)
        if rest in (b"[1]\n", b'{"mine": 1}'):
            with pytest.raises(ConfigError, match="no rows of this command"):
                published.main([*words, "1stage_L"])
            assert torn.read_bytes() == rest
            continue
        tried.clear()
        assert published.main([*words, "1stage_L"]) == 0
        assert len(tried) == (0 if rest == file[:-1] else 7), rest
        assert torn.read_bytes() + b"\n" * (rest == file[:-1]) == file
    torn.write_bytes(file + file[:40])
    monkeypatch.setattr(published, "code_hash", lambda: "other code")
    with open(torn, "rb") as other, pytest.raises(ConfigError, match="written by another process"):
        lock(other, "out")
        published.main([*words, "1stage_L"])
    assert torn.read_bytes() == file + file[:40]
    tried.clear()
    assert published.main([*words, "1stage_L"]) == 0 and len(tried) == 7
    assert [json.loads(line)["code"] for line in torn.read_text().splitlines()][1:] == [
        "other code"
    ]


# --- topologies ---------------------------------------------------------------------------------


@pytest.mark.libtpu
@pytest.mark.parametrize("topology, devices", [("v5e:2x2", 4), ("v5p:4x4x4", 64)])
def test_plan_of_a_small_model(tiny, capsys, topology, devices):
    once = ["--rate", "1"] if devices == 64 else []
    assert main(["--topology", topology, "--no-code", *once, *tiny]) == 0
    out = capsys.readouterr().out
    assert out.count("memory per device") == 2 - len(once) // 2
    params = sum(param_counts(run_config(tiny).model).values())
    assert f"{devices} devices" in out and f"parameters {params:,}" in out
    assert re.search(r"state \S+ KiB, activations .* fits\n", out)
    assert re.search(rf"all-reduce +over {devices} ", out)
    assert re.search(r"mostly bound by \w+: [\d,]+ bytes/s and \d+% of the peak at most", out)


@pytest.mark.libtpu
def test_gradients_are_reduced_once_and_the_state_is_counted(tiny):
    config = run_config(tiny)
    plan = compile_plan(config, open_slice("v5e:4x4"), (32,), to_code=False)
    params = sum(param_counts(config.model).values())
    assert plan.fits and len(plan.slice_.devices) == 16 and plan.compile_seconds is None
    # parameters and two moments of AdamW, each replicated on every device
    assert plan.state_bytes == pytest.approx(3 * 4 * params, rel=0.01)
    assert plan.state_bytes < plan.hbm_bytes < 64 * 2**20
    reduced = sum(m.num_bytes for m in plan.moved if m.kind == "all-reduce")
    assert reduced == pytest.approx(2 * 15 / 16 * 4 * params, rel=0.1)
    parts = {m.part for m in plan.moved}
    assert {"stage0/encoder", "stage1/main_network", "optimizer", "lm_head"} <= parts


@pytest.mark.libtpu
def test_fsdp_gathers_parameters_and_leaves_rows_where_they_are(tiny):
    wide = ["--model.stages.0.d_model", "256", "--model.stages.1.d_model", "512"]
    config = run_config([*tiny, *wide, "--mesh.data", "1", "--mesh.fsdp", "4"])
    slice_ = open_slice("v6e:2x2")
    plan = compile_plan(config, slice_, (32,), to_code=False)
    num_bytes = 4 * sum(param_counts(config.model).values())
    sent = [m for m in plan.moved if m.kind != "hbm"]
    # a matrix forward, some again backward, its gradient once (reduce-scatter); no activations,
    # which are at least as large
    share = {m.kind: 0.0 for m in sent}
    for m in sent:
        share[m.kind] += m.num_bytes / (0.75 * num_bytes)
    assert share.keys() == {"all-gather", "reduce-scatter", "all-reduce"}
    assert share["reduce-scatter"] == pytest.approx(1, abs=0.1)
    assert 0.9 < share["all-gather"] < 2.2 and share["all-reduce"] < 0.1

    compiled = compile_plan(config, slice_, (32,))
    assert compiled.moved == plan.moved and compiled.compile_seconds > 0
    assert plan.state_bytes < plan.hbm_bytes < compiled.hbm_bytes  # the code is counted too


@pytest.mark.libtpu
def test_too_much_is_said_and_fails(tiny, capsys):
    words = ["--topology", "v5e:2x2", "--rate", "1", *tiny, "--data.batch_size", "1048576"]
    assert main(words) == 1
    out = capsys.readouterr().out
    assert re.search(r"together at least \d+\.\d+ GiB of 16\.00 GiB: DOES NOT FIT", out)
    assert "--search tries them" in out


@pytest.mark.parametrize(
    "message, num_bytes",
    [
        ("the total memory required for HLO temporaries (200.50G) exceeds 15.75G", 200.5 * GIB + 7),
        ("Used 23.1G of 15.75G hbm. Exceeded hbm capacity by 7.35G.", 23.1 * GIB),
        ("Used 23.0M of 15.75M hbm.", 23 * 2**20),
        ("no numbers", math.inf),
    ],
)
def test_what_the_compiler_says_when_it_gives_up(message, num_bytes):
    assert _refused_bytes(message, 7) == num_bytes


@pytest.mark.parametrize(
    "topology", ["v5e", "v5e:4", "gpu:2x2", "v5e:4x4; rm", "", "h100", "h100:0", "h100:2x2x2"]
)
def test_unknown_topologies_get_one_line(topology):
    with pytest.raises(ConfigError, match="use KIND:SHAPE such as v5e:4x4") as e:
        open_slice(topology)
    assert "\n" not in str(e.value)


@pytest.mark.libtpu
def test_impossible_topologies_and_batches_get_one_line(tiny):
    with pytest.raises(ConfigError, match="cannot be compiled for") as e:
        open_slice("v5e:3x7")
    assert "\n" not in str(e.value)
    with pytest.raises(ConfigError, match="data.batch_size=6 is not a multiple"):
        compile_plan(run_config([*tiny, "--data.batch_size", "6"]), open_slice("v5e:2x2"), (32,))


def test_the_cpu_stays_the_default_device():
    assert jax.default_backend() == "cpu"
