"""Roofline of a compiled step: what bounds it, and the report about it."""

from typing import NamedTuple

from hnet.cost import Cost
from hnet.flops import forward_flops, param_counts, total, training_flops
from hnet.train.config import Config
from tpu import hlo
from tpu.aot import Plan, capacities

RATES = (0.5, 0.75, 1.0, 1.5, 2.0)  # multiples of the configured boundary rate


class Bound(NamedTuple):
    """Least seconds per step that a part needs of each of four resources."""

    compute: float = 0.0
    hbm: float = 0.0
    network: float = 0.0
    launches: float = 0.0

    @property
    def name(self) -> str:
        return max(zip(self, self._fields))[1]


def roofline(plan: Plan) -> dict[str, Bound]:
    """Least time of every part, forward and backward, by resource, if that is used fully."""
    trained = _trained(plan)
    rows = plan.config.data.batch_size / len(plan.slice_.devices)
    chip, share = plan.slice_.chip, plan.slice_.chips_a_device
    bounds: dict[str, Bound] = {}
    for part in dict.fromkeys([*trained] + [m.part for m in plan.moved]):
        own = trained.get(part, Cost())
        flops = rows * (own.matmul + (chip.float32_slowness - 1) * own.exact)
        hbm = hbm_bytes(plan, part)
        network = sum(
            m.num_bytes / plan.slice_.network_rate(m.group, m.span)
            for m in plan.moved
            if m.part == part and m.kind != "hbm"
        )
        compute, launches = flops / (chip.flops * share), kernels(plan, part) * chip.launch
        bounds[part] = Bound(compute, hbm / (chip.hbm_rate * share), network, launches)
    return bounds


def _trained(plan: Plan, remat: str | None = None) -> dict[str, Cost]:
    """Operations of each part, forward and backward, per row; `remat`: those of our array code with
    this setting, instead of those that are executed."""
    lengths = (plan.config.data.seq_len, *plan.capacities)
    model, kernels = plan.config.model, remat is None
    return training_flops(model, lengths, plan.rows_sharing_slots, remat=remat, kernels=kernels)


def kernels(plan: Plan, part: str | None = None) -> float:
    """Operations per step that read or write memory or send data; on a GPU, its kernels."""
    return sum(m.count for m in plan.moved if part in (m.part, None))


def hbm_bytes(plan: Plan, part: str | None = None) -> float:
    """Bytes of HBM that one device reads and writes per step."""
    return sum(m.num_bytes for m in plan.moved if m.kind == "hbm" and part in (m.part, None))


def hbm_per_byte(plan: Plan) -> float:
    """Bytes of HBM read and written per byte of text."""
    text = plan.config.data.batch_size * plan.config.data.seq_len / len(plan.slice_.devices)
    return hbm_bytes(plan) / text


def step_seconds(plan: Plan) -> float:
    """Least seconds per step if each part is bound by its slowest resource and none overlap."""
    return sum(max(bound) for bound in roofline(plan).values())


def step_bound(plan: Plan) -> str:
    """The resource with the largest total time over the parts that it bounds."""
    seconds = dict.fromkeys(Bound._fields, 0.0)
    for bound in roofline(plan).values():
        seconds[bound.name] += max(bound)
    return max(seconds, key=seconds.__getitem__)


def peak_share(plan: Plan) -> float:
    """Share of the slice's peak FLOPs used in `step_seconds`, without recomputation by remat."""
    useful = total(_trained(plan, remat="none")) * plan.config.data.batch_size
    slice_ = plan.slice_
    peak = slice_.chip.flops * slice_.chips_a_device * len(slice_.devices)
    return useful / step_seconds(plan) / peak


def bytes_per_second(plan: Plan) -> float:
    """Upper bound on bytes of text per second on the slice."""
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
    least = "" if plan.moved else "at least "  # a program that was given up has no traffic
    return (
        f"{plan.slice_.name}: {len(plan.slice_.devices)} devices, {config.data.batch_size} rows of "
        f"{config.data.seq_len} bytes, slots {plan.capacities}{code}\n"
        f"  memory per device: state {size(plan.state_bytes)}, activations and temporaries "
        f"{least}{size(rest)}, together {least}{size(plan.hbm_bytes)} of "
        f"{size(plan.hbm_per_device)}: {'fits' if plan.fits else 'DOES NOT FIT'}"
    )


def report(plan: Plan) -> str:
    """FLOPs, collectives and the bound of each part, for the plan reported by `memory`."""
    config = plan.config
    params = param_counts(config.model)
    lines = [
        f"parameters {sum(params.values()):,} (embedding {params['embeddings']:,})",
        "",
        *_flops_table(config, plan.rows_sharing_slots),
    ]
    lines += ["", "collectives per device and step (bytes sent, for a ring):"]
    kinds: dict[tuple[str, int], list[hlo.Traffic]] = {}
    for m in plan.moved:
        if m.kind != "hbm":
            kinds.setdefault((m.kind, m.group), []).append(m)
    for (kind, group), found in sorted(kinds.items()):
        sent, count = sum(m.num_bytes for m in found), sum(m.count for m in found)
        lines.append(f"  {kind:<20}over {group:<6}{count:7.0f} times {size(sent):>12} in all")
    lines += ["", *_parts_table(plan)]
    return "\n".join(lines)


def _parts_table(plan: Plan) -> list[str]:
    kind = "kernels" if plan.slice_.is_gpu else "operations"
    columns = "".join(f"{name:>10}" for name in (kind, "HBM GB", *Bound._fields))
    lines = [f"per device and step, least ms:\n  {'part':<24}{columns}  bound"]
    bounds = roofline(plan)
    for part, bound in bounds.items():
        times = "".join(f"{1e3 * seconds:10.3g}" for seconds in bound)
        counted = f"{kernels(plan, part):10,.0f}{hbm_bytes(plan, part) / 1e9:10.3g}"
        lines.append(f"  {part:<24}{counted}{times}  {bound.name if max(bound) else '-'}")
    sums = "".join(f"{1e3 * sum(column):10.3g}" for column in zip(*bounds.values()))
    lines += [
        f"  {'all':<24}{kernels(plan):10,.0f}{hbm_bytes(plan) / 1e9:10.3g}{sums}",
        f"  each step: {1e3 * step_seconds(plan):.3g} ms at least, mostly bound by "
        f"{step_bound(plan)}: {bytes_per_second(plan):,.0f} bytes/s and "
        f"{100 * peak_share(plan):.0f}% of the peak at most; "
        f"{hbm_per_byte(plan) / 1e6:.3g} MB of HBM per byte of text",
    ]
    return lines


def _flops_table(config: Config, rows_sharing_slots: int) -> list[str]:
    L, model = config.data.seq_len, config.model
    lines = ["MFLOPs per byte by boundary rate, with the slots that training would choose:"]
    lengths = {factor: (L, *capacities(config, factor)) for factor in RATES}
    parts = [forward_flops(model, each, rows_sharing_slots) for each in lengths.values()]
    trained = [total(training_flops(model, each, rows_sharing_slots)) for each in lengths.values()]
    rows = {part: [p[part].total for p in parts] for part in parts[0]}
    rows |= {"forward": [total(p) for p in parts], "training": trained}
    lines.append(f"  {'rate / configured':<24}" + "".join(f"{factor:>10g}" for factor in RATES))
    for name, values in rows.items():
        lines.append(f"  {name:<24}" + "".join(f"{v / L / 1e6:10.4g}" for v in values))
    step = trained[RATES.index(1.0)] * config.data.batch_size
    lines.append(f"  each step: {step / 1e12:.4g} TFLOPs")
    return lines
