"""Floating-point operations of a function, counted in its jaxpr.

Model FLOPs: matrix products and convolutions, two per multiply-add, a scan's body as often as it
runs, a Pallas kernel's at each point of its grid. Compiled programs count a scan's body once, and
recomputation as work, so they do not compare.
"""

import math
from collections.abc import Callable

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


def count(function: Callable, *args) -> int:
    """Counts the FLOPs of `function(*args)`; shapes (`jax.ShapeDtypeStruct`) will do for args."""
    return _jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def _jaxpr(jaxpr: Jaxpr) -> int:
    return sum(_equation(equation) for equation in jaxpr.eqns)


def _equation(equation) -> int:
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        sizes = equation.invars[0].aval.shape
        return 2 * equation.outvars[0].aval.size * math.prod(sizes[i] for i in contracted)
    if equation.primitive.name == "conv_general_dilated":
        kernel = equation.invars[1].aval
        outputs = equation.params["dimension_numbers"].rhs_spec[0]
        return 2 * equation.outvars[0].aval.size * kernel.size // kernel.shape[outputs]
    inner = [_jaxpr(j) for value in equation.params.values() for j in _jaxprs(value)]
    if equation.primitive.name == "cond":
        return max(inner)
    return sum(inner) * equation.params.get("length", 1) * _turns(equation)


def _turns(equation) -> int:
    """How often a Pallas kernel's body runs: the points of its grid."""
    if equation.primitive.name != "pallas_call":
        return 1
    return math.prod(equation.params["grid_mapping"].grid)


def _jaxprs(value) -> list[Jaxpr]:
    if isinstance(value, ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, Jaxpr):
        return [value]
    return [j for v in value for j in _jaxprs(v)] if isinstance(value, (tuple, list)) else []
