"""What bounds a compiled step, and the report about it."""

from dataclasses import replace
from typing import NamedTuple

from hnet.flops import Term, flops_by_part, forward_terms, param_counts, training_flops
from hnet.train.config import Config
from tpu import hlo
from tpu.aot import Plan, capacities

RATES = (0.5, 0.75, 1.0, 1.5, 2.0)  # of the configured boundary rate
FLOAT32_PASSES = ("routing", "residual_proj", "dechunk", "pool")  # matmuls at full precision


class Bound(NamedTuple):
    """Seconds a step that a part needs at least on each of three resources."""

    compute: float = 0.0
    hbm: float = 0.0
    network: float = 0.0

    @property
    def name(self) -> str:
        return max(zip(self, self._fields))[1]


def roofline(plan: Plan) -> dict[str, Bound]:
    """Least time of every part, forward and backward, with each resource alone and used fully."""
    terms = _terms(plan.config, plan.capacities, plan.packed_rows)
    rows = plan.config.data.batch_size / len(plan.slice_.devices)
    chip, share = plan.slice_.chip, plan.slice_.chips_a_device
    bounds: dict[str, Bound] = {}
    for part in dict.fromkeys([t.part for t in terms] + [m.part for m in plan.moved]):
        own = tuple(t for t in terms if t.part == part and t.kind != "elementwise")
        passes = 6 if part.endswith(FLOAT32_PASSES) else 1
        flops = training_flops(own, plan.config.model.compute.remat) * rows * passes
        hbm = sum(m.num_bytes for m in plan.moved if m.part == part and m.kind == "hbm")
        network = sum(
            m.num_bytes / plan.slice_.network_rate(m.group)
            for m in plan.moved
            if m.part == part and m.kind != "hbm"
        )
        bounds[part] = Bound(flops / (chip.flops * share), hbm / (chip.hbm_rate * share), network)
    return bounds


def _terms(config: Config, slots: tuple[int, ...], packed_rows: int) -> tuple[Term, ...]:
    """Of one row. Where rows share slots, the stages inside see all of them as one long row."""
    L = config.data.seq_len
    alone = forward_terms(config.model, (L, *slots))
    together = forward_terms(config.model, (L, *(packed_rows * n for n in slots)))
    return tuple(
        replace(many, flops=many.flops / packed_rows) if _is_inside(many.part) else one
        for one, many in zip(alone, together)
    )


def _is_inside(part: str) -> bool:
    return part.startswith("stage") and not part.startswith("stage0/")


def step_seconds(plan: Plan) -> float:
    """Least time of a step if each part is bound by its slowest resource and none overlap."""
    return sum(max(bound) for bound in roofline(plan).values())


def step_bound(plan: Plan) -> str:
    """The resource that bounds parts which together take most of the step."""
    seconds = dict.fromkeys(Bound._fields, 0.0)
    for bound in roofline(plan).values():
        seconds[bound.name] += max(bound)
    return max(seconds, key=seconds.__getitem__)


def peak_share(plan: Plan) -> float:
    """Share of the slice's peak that a step of `step_seconds` is, without what remat repeats."""
    terms = _terms(plan.config, plan.capacities, plan.packed_rows)
    useful = training_flops(terms) * plan.config.data.batch_size
    slice_ = plan.slice_
    peak = slice_.chip.flops * slice_.chips_a_device * len(slice_.devices)
    return useful / step_seconds(plan) / peak


def bytes_a_second(plan: Plan) -> float:
    """Bytes of text a second that the slice cannot exceed."""
    return plan.config.data.batch_size * plan.config.data.seq_len / step_seconds(plan)


def size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.2f} GiB"


def memory(plan: Plan) -> str:
    config, rest = plan.config, plan.hbm_bytes - plan.state_bytes
    code = "" if plan.compile_seconds is None else f", compiled in {plan.compile_seconds:.0f} s"
    least = "" if plan.moved else "at least "  # nothing moves in a program that was given up
    return (
        f"{plan.slice_.name}: {len(plan.slice_.devices)} devices, {config.data.batch_size} rows of "
        f"{config.data.seq_len} bytes, slots {plan.capacities}{code}\n"
        f"  memory a device: state {size(plan.state_bytes)}, activations and temporaries "
        f"{least}{size(rest)}, together {least}{size(plan.hbm_bytes)} of "
        f"{size(plan.hbm_a_device)}: {'fits' if plan.fits else 'DOES NOT FIT'}"
    )


def report(plan: Plan) -> str:
    """FLOPs, collectives and the bound of each part of what `memory` spoke of."""
    config = plan.config
    params = param_counts(config.model)
    lines = [
        f"parameters {sum(params.values()):,} (embedding {params['embedding']:,})",
        "",
        *_flops_table(config, plan.packed_rows),
    ]
    lines += ["", "collectives a device and step (bytes sent, for a ring):"]
    kinds: dict[tuple[str, int], list[hlo.Moved]] = {}
    for m in plan.moved:
        if m.kind != "hbm":
            kinds.setdefault((m.kind, m.group), []).append(m)
    for (kind, group), found in sorted(kinds.items()):
        sent, count = sum(m.num_bytes for m in found), sum(m.count for m in found)
        lines.append(f"  {kind:<20}over {group:<6}{count:7.0f} times {size(sent):>12} in all")
    bounds = roofline(plan)
    lines += ["", f"{'least ms of a part':<26}{'compute':>10}{'hbm':>10}{'network':>10}  bound"]
    for part, bound in bounds.items():
        times = "".join(f"{1e3 * seconds:10.3g}" for seconds in bound)
        lines.append(f"  {part:<24}{times}  {bound.name}")
    step = step_seconds(plan)
    lines += [
        f"  {'step':<24}{1e3 * step:10.3g} at least, mostly bound by {step_bound(plan)}: "
        f"{bytes_a_second(plan):,.0f} bytes/s and {100 * peak_share(plan):.0f}% of the peak at most"
    ]
    return "\n".join(lines)


def _flops_table(config: Config, packed_rows: int) -> list[str]:
    L, remat = config.data.seq_len, config.model.compute.remat
    lines = ["MFLOPs a byte by boundary rate, in slots that training would choose:"]
    columns = {}
    for factor in RATES:
        columns[factor] = _terms(config, capacities(config, factor), packed_rows)
    lines.append(f"  {'rate / configured':<24}" + "".join(f"{factor:>10g}" for factor in RATES))
    parts = [flops_by_part(terms) for terms in columns.values()]
    for part in parts[0]:
        lines.append(f"  {part:<24}" + "".join(f"{p[part] / L / 1e6:10.4g}" for p in parts))
    sums = [sum(p.values()) for p in parts]
    lines.append(f"  {'forward':<24}" + "".join(f"{s / L / 1e6:10.4g}" for s in sums))
    trained = [training_flops(terms, remat) for terms in columns.values()]
    lines.append(f"  {'training':<24}" + "".join(f"{s / L / 1e6:10.4g}" for s in trained))
    step = training_flops(columns[1.0], remat) * config.data.batch_size
    lines.append(f"  a step: {step / 1e12:.4g} TFLOPs")
    return lines
