"""Operation counts of a traced program, grouped by the named scopes of its equations.

`count` traces a function on shapes and walks its jaxpr: nothing is compiled, no array is allocated.
A multiply-add is two operations. Element-wise operations are counted as in XLA: one per element,
none for data movement or for exp, log, sqrt and similar functions.

The name of a part is the innermost `stage<i>` and the scope inside it ("stage1/encoder"), or the
outermost scope if there is no stage ("lm_head", "loss"); equations without a scope are "other".
"""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import astuple, dataclass
from typing import Any

import jax
from jax.extend.core import jaxprs_in_params
from jax.interpreters.partial_eval import dce_jaxpr

from hnet.errors import ConfigError

_FREE = frozenset(
    # move or create data
    "broadcast_in_dim concatenate convert_element_type copy copy_p device_put dynamic_slice "
    "dynamic_update_slice gather get iota name optimization_barrier pad random_bits random_fold_in "
    "random_seed random_split random_unwrap random_wrap reshape reshard rev scatter "
    "sharding_constraint slice split squeeze stop_gradient swap transpose "
    # XLA counts these separately, as transcendentals
    "atan2 cbrt cos erf exp expm1 log log1p pow rsqrt sin sqrt tan tanh".split()
)
_PER_ELEMENT = {"erfc": 62, "logistic": 3}  # operations per element in XLA's expansion
_READS = ("reduce", "cum", "arg", "scatter")  # primitives with one operation per input element
_TRIPS = "trips="
_REMAT = ("checkpoint", "rematted_computation")


@dataclass(frozen=True)
class Cost:
    """Operations of one part."""

    matmul: float = 0.0
    """operations of matrix products and convolutions"""
    exact: float = 0.0
    """operations included in `matmul` that use `Precision.HIGHEST`"""
    elementwise: float = 0.0
    """all other operations"""

    @property
    def total(self) -> float:
        return self.matmul + self.elementwise

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*map(sum, zip(astuple(self), astuple(other))))

    def __mul__(self, times: float) -> "Cost":
        return Cost(*(times * each for each in astuple(self)))


def trips(mean: float) -> AbstractContextManager:
    """Named scope that gives the mean number of iterations of a loop with dynamic bounds.

    `count` then counts the loop like other code, in the backward pass too.
    """
    return jax.named_scope(f"{_TRIPS}{float(mean)}")


def count(function: Callable, *args: Any, **static: Any) -> dict[str, Cost]:
    """Operations of each part of `function(*args, **static)`, parts in order of first execution.

    args: pytrees of arrays or of their shapes (jax.ShapeDtypeStruct). A conditional counts as its
    most expensive branch. Raises ConfigError for a loop with dynamic bounds outside of `trips`.
    """
    traced = jax.make_jaxpr(lambda *args: function(*args, **static))(*args)
    live, _ = dce_jaxpr(traced.jaxpr, True)
    parts: dict[str, Cost] = {}
    for part, cost in _walk(live, ()):
        if cost.total:
            parts[part] = parts.get(part, Cost()) + cost
    return parts


def _walk(jaxpr: Any, around: tuple[str, ...]) -> Iterator[tuple[str, Cost]]:
    """(part, operations) of every equation; around: scopes of the enclosing equation."""
    for equation in jaxpr.eqns:
        # "transpose(jvp(stage0))/encoder": names before a parenthesis are transformations
        names = re.findall(r"([^/()]+)(?=[/)]|$)", str(equation.source_info.name_stack))
        scopes, name = (*around, *names), equation.primitive.name
        bodies = [getattr(body, "jaxpr", body) for body in jaxprs_in_params(equation.params)]
        if not bodies or name.startswith(_READS):
            yield _part(scopes), _cost(equation)
            continue
        found = [list(_walk(body, scopes)) for body in bodies]
        if name == "cond":
            found = [max(found, key=lambda body: sum(cost.total for _, cost in body))]
        times = _times(equation, scopes)
        yield from ((part, cost * times) for body in found for part, cost in body)


def _part(scopes: tuple[str, ...]) -> str:
    # einsum and jax.checkpoint add scopes of their own, which are dropped here
    names = [name for name in scopes if name.isidentifier() and name not in _REMAT]
    stages = [i for i, name in enumerate(names) if re.fullmatch(r"stage\d+", name)]
    if stages:
        return "/".join(names[stages[-1] :][:2])
    return names[0] if names else "other"


def _times(equation: Any, scopes: tuple[str, ...]) -> float:
    """Number of executions of the bodies of an equation."""
    params = equation.params
    match equation.primitive.name:
        case "scan":
            return params["length"]
        case "while":
            stated = [name for name in scopes if name.startswith(_TRIPS)]
            if stated:
                return float(stated[-1].removeprefix(_TRIPS))
            raise ConfigError(
                f"a loop in {_part(scopes)} has bounds that are read at run time: to count its "
                "operations, put it in `with hnet.cost.trips(mean)`"
            )
        case "shard_map":  # its body is the program of one device
            return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
        case "pallas_call":
            return math.prod(params["grid_mapping"].grid)
        case _:
            return 1


def _cost(equation: Any) -> Cost:
    name, params = equation.primitive.name, equation.params
    size = max((_size(out) for out in equation.outvars), default=0)
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        matmul = 2.0 * size * math.prod(shape[axis] for axis in contracted)
    elif name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        out_features = kernel[params["dimension_numbers"].rhs_spec[0]]
        matmul = 2.0 * size * math.prod(kernel) / out_features
    elif name in _FREE:
        return Cost()
    else:
        if name.startswith(_READS):
            size = _size(equation.invars[-1])
        return Cost(elementwise=_PER_ELEMENT.get(name, 1.0) * size)
    exact = params["precision"] in (jax.lax.Precision.HIGHEST, (jax.lax.Precision.HIGHEST,) * 2)
    return Cost(matmul, matmul * exact)


def _size(variable: Any) -> int:
    return math.prod(getattr(variable.aval, "shape", ()))
