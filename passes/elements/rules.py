"""The elements of a mask, as sympy functions of (b, h, q, k).

Evaluation is by demand: `value(node, index)` is the node's element at a symbolic index. An op that is not understood is
an opaque function of its index, which is sound: only what the expression provably does not depend on is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch.fx import Node

from monarch_compile.passes.capture.enclosed import given_value, name_of
from monarch_compile.passes.constants import constant_of, held_by
from monarch_compile.passes.elements.holding import (
    EXACT_CASTS,
    is_carried,
    is_compared,
    is_held,
    is_kept,
    leaves,
    overflowed,
    rounded,
)
from monarch_compile.passes.elements.values import (
    CASTS_AND_COPIES,
    Index,
    Place,
    Rule,
    Unknown,
    as_bool,
    as_number,
    broadcast,
    literal,
    number,
)
from monarch_compile.passes.elements.views import VIEW_RULES
from monarch_compile.passes.graph import FLOATS, arg, aten, dtype_of, inputs, normal_dim, shape_of, value_of

MAX_PIECES = 32
"""A bound on the cases that arithmetic may give rise to."""


class Evaluator:
    """Element of a node at a symbolic index, memoised."""

    def __init__(self) -> None:
        self._known: dict[tuple[Node, Index], Any] = {}

    def value(self, node: Any, index: Index) -> Any:
        """The element of a node, or a plain number."""
        if not isinstance(node, Node):
            return as_bool(node) if isinstance(node, bool) else literal(node)
        key = (node, index)
        if key not in self._known:
            self._known[key] = self._compute(node, index)
        return self._known[key]

    def _compute(self, node: Node, index: Index) -> Any:
        constant = constant_of(node)
        if constant is not None:
            return number(constant)
        given = given_value(node)
        if given is not None:
            return self.value(given, index)
        if isinstance(node.meta.get("val"), torch.SymInt):
            return node.meta["val"].node.expr  # a size, known by the symbols that shapes are made of
        rule = RULES.get(node.target) if node.op == "call_function" else None
        try:
            found = rule(self, node, index) if rule is not None else None
        except LookupError:  # sympy has no rule for conditions without symbols
            found = None
        return self.opaque(node, index) if found is None or found.has(sympy.nan) else found

    def opaque(self, node: Node, index: Index) -> Any:
        """An unknown function of the index; a bool one is the condition that it is not 0."""
        kind = {"real": True} if dtype_of(node) in FLOATS else {"integer": True}
        name = f"{name_of(node)}_"
        leaf = sympy.Function(name, **kind)(*index) if index else Unknown(name, **kind)
        return sympy.Ne(leaf, 0) if dtype_of(node) == torch.bool else leaf

    def operand(self, node: Node, place: int, index: Index) -> Any:
        """The element of an elementwise op's operand."""
        given = inputs(node)[place]
        return self.value(given, broadcast(given, index))

    def carried(self, node: Node, place: int, index: Index, dtype: torch.dtype | None) -> Any:
        """The element of the operand of an op that reads it as a dtype; None where its own dtype rounded it before, so
        that the number is not known."""
        value = self.operand(node, place, index)
        return value if is_carried(as_number(value), _own_dtype(node, place, dtype), dtype) else None

    def depending(self, node: Node, index: Index, *values: Any) -> Any:
        """`opaque`, as a function of those parts of the index alone that some values depend on."""
        symbols = {symbol for v in values for symbol in v.free_symbols}
        kept = (not getattr(at, "free_symbols", None) or at.free_symbols & symbols for at in index)
        return self.opaque(
            node, tuple(at if is_kept else sympy.Integer(0) for at, is_kept in zip(index, kept, strict=True))
        )


def _own_dtype(node: Node, place: int, read_as: torch.dtype | None) -> torch.dtype | None:
    """The dtype of an operand; of a number that the program spells, the one that it is read as."""
    given = inputs(node)[place]
    if not isinstance(given, Node):
        return read_as
    return torch.int64 if isinstance(given.meta.get("val"), torch.SymInt) else dtype_of(given)


def _same(e: Evaluator, n: Node, i: Index) -> Any:
    """A copy or a cast; a cast that may round or wrap is followed only for values it keeps."""
    source, target = dtype_of(inputs(n)[0]), dtype_of(n)
    value = e.carried(n, 0, i, target)
    if value is None:
        return e.depending(n, i, as_number(e.operand(n, 0, i)))
    if target == torch.bool:
        return as_bool(value)
    value = as_number(value)
    if target == source:
        return value
    if target in EXACT_CASTS and not (source in FLOATS and target not in FLOATS):
        wraps = target == torch.int32 and not all(is_held(leaf, target) for leaf in leaves(value))
        return None if wraps else rounded(value, target)
    return value if is_kept(value, target) else None


def _compare(relation: Callable[[Any, Any], Any]) -> Rule:
    def rule(e: Evaluator, n: Node, i: Index) -> Any:
        (x, y), dtype = (as_number(e.operand(n, place, i)) for place in (0, 1)), _compared_in(n)
        held = (is_compared(v, _own_dtype(n, place, dtype), dtype) for place, v in enumerate((x, y)))
        is_known = not _unknown_floats(x, y) and all(held)
        return relation(x, y) if is_known else e.depending(n, i, x, y)

    return rule


def _compared_in(n: Node) -> torch.dtype:
    """The dtype to which a comparison casts its operands: it may hold fewer numbers than theirs."""
    x, y = (value_of(given) if isinstance(given, Node) else given for given in inputs(n)[:2])
    return torch.result_type(x, y)


def _unknown_floats(*values: Any) -> set[Any]:
    """Unknown floats in some values: they may be NaN, for which the laws of order and arithmetic do not hold."""
    atoms = {atom for v in values for atom in v.atoms(AppliedUndef, sympy.Symbol) if not isinstance(atom, Place)}
    return {a for a in atoms if not a.is_integer}


def _symbols(*values: Any) -> Index:
    """The index symbols that some values depend on."""
    return tuple(sorted({symbol for v in values for symbol in v.free_symbols if isinstance(symbol, Place)}, key=str))


def _logical(combine: Callable[..., Any]) -> Rule:
    def rule(e: Evaluator, n: Node, i: Index) -> Any:
        if dtype_of(n) != torch.bool:
            return None
        given = [e.carried(n, place, i, torch.bool) for place in range(len(inputs(n)))]
        return None if any(value is None for value in given) else combine(*map(as_bool, given))

    return rule


def _arithmetic(combine: Callable[[Any, Any], Any]) -> Rule:
    def rule(e: Evaluator, n: Node, i: Index) -> Any:
        if n.kwargs.get("alpha", 1) != 1 or len(inputs(n)) != 2:
            return None
        dtype = dtype_of(n)
        given = [e.carried(n, place, i, dtype) for place in (0, 1)]
        if any(value is None for value in given):
            return None
        x, y = (overflowed(as_number(v), _computed_in(dtype)) for v in given)
        if math.prod(len(v.args) for v in (x, y) if isinstance(v, sympy.Piecewise)) > MAX_PIECES:
            return None
        result = combine(x, y)
        result = overflowed(sympy.piecewise_fold(result) if result.has(sympy.Piecewise) else result, dtype)
        if dtype == torch.bool:
            return as_bool(result)
        exact = _is_exact(result, dtype, x, y) and all(
            _is_exact_pair(combine, a, b, dtype) for a in leaves(x) for b in leaves(y)
        )
        return result if exact else None

    return rule


def _is_exact(result: Any, dtype: torch.dtype | None, *operands: Any) -> bool:
    """Whether arithmetic in the dtype gives what it gives in numbers: no overflow, no rounding that a later step
    could bring out. An int64 index times a small number does; a float sum may not have lost an operand's symbol, nor
    the numbers that show where an operand was rounded."""
    inexact = [leaf for v in operands for leaf in leaves(v) if not is_held(leaf, dtype)]
    if is_kept(result, dtype):
        return not _unknown_floats(*operands) and all(leaf.is_number for leaf in inexact)
    if dtype in (torch.float32, torch.float64):
        lost = _symbols(*operands) != _symbols(result) or _unknown_floats(*operands) - _unknown_floats(result)
        return not lost and _terms(*inexact) <= _terms(*leaves(result))
    return dtype == torch.int64 and all(is_held(leaf, dtype) for leaf in leaves(result))


def _is_exact_pair(combine: Callable[[Any, Any], Any], x: Any, y: Any, dtype: torch.dtype | None) -> bool:
    """Whether two values of which one is rounded, such as -1e9 in 16 bits, give none that hides that, nor one that
    hides an unknown float: 0 times an infinity is NaN."""
    result, inexact = combine(x, y), [v for v in (x, y) if not is_held(v, dtype)]
    if _unknown_floats(x, y) - _unknown_floats(result):
        return False
    if result is sympy.nan or x == 0 or y == 0 or not inexact or x.is_infinite or y.is_infinite:
        return result is not sympy.nan
    if x.is_number and y.is_number:
        return not is_held(result, dtype)
    return _terms(*inexact) <= _terms(result)


def _computed_in(dtype: torch.dtype | None) -> torch.dtype | None:
    """The dtype in which arithmetic that gives a dtype is done: scalars are not rounded to 16 bits."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _terms(*values: Any) -> set[Any]:
    """The terms of sums, each as what is multiplied by a number, and the magnitude of that; 1 is none."""
    found = set()
    for value in values:
        for term in sympy.Add.make_args(sympy.expand(value)):
            factor, rest = term.as_coeff_Mul()
            found |= {rest, abs(factor)} if rest != 1 else {("number", abs(factor))}
    return found - {sympy.Integer(1), ("number", sympy.Integer(0))}


def _where(condition: Any, x: Any, y: Any, dtype: torch.dtype | None) -> Any:
    condition = as_bool(condition)
    if dtype == torch.bool:
        x, y = as_bool(x), as_bool(y)
        return sympy.Or(sympy.And(condition, x), sympy.And(sympy.Not(condition), y))
    chosen, other = (rounded(as_number(v), dtype) for v in (x, y))
    return None if chosen is None or other is None else sympy.Piecewise((chosen, condition), (other, True))


def _rule_where(e: Evaluator, n: Node, i: Index) -> Any:
    x, y = (e.carried(n, place, i, dtype_of(n)) for place in (1, 2))
    return None if x is None or y is None else _where(e.operand(n, 0, i), x, y, dtype_of(n))


def _rule_masked_fill(e: Evaluator, n: Node, i: Index) -> Any:
    old, fill = (e.carried(n, place, i, dtype_of(n)) for place in (0, 2))
    return None if old is None or fill is None else _where(e.operand(n, 1, i), fill, old, dtype_of(n))


def _filled(number: int) -> Rule:
    return lambda e, n, i: as_bool(bool(number)) if dtype_of(n) == torch.bool else sympy.Integer(number)


def _rule_full(place: int) -> Rule:
    def rule(e: Evaluator, n: Node, i: Index) -> Any:
        given = arg(n, place, "fill_value")
        fill = float(given) if isinstance(given, bool) else constant_of(given)
        if fill is None or dtype_of(n) == torch.bool:
            return None if fill is None else as_bool(bool(fill))
        return number(fill) if is_kept(number(fill), dtype_of(n)) else None

    return rule


def _rule_triangle(lower: bool) -> Rule:
    def rule(e: Evaluator, n: Node, i: Index) -> Any:
        diagonal = arg(n, 1, "diagonal", 0)
        if isinstance(diagonal, Node) and isinstance(diagonal.meta.get("val"), torch.SymInt):
            diagonal = e.value(diagonal, ())
        elif not isinstance(diagonal, int):
            return None
        inside = sympy.Le(i[-1], i[-2] + diagonal) if lower else sympy.Ge(i[-1], i[-2] + diagonal)
        return _where(inside, e.operand(n, 0, i), 0, dtype_of(n))

    return rule


def _rule_negative(e: Evaluator, n: Node, i: Index) -> Any:
    given = as_number(e.operand(n, 0, i))
    value = sympy.piecewise_fold(-given)
    return value if _is_exact(value, dtype_of(n), given) else None


def _rule_divide(e: Evaluator, n: Node, i: Index) -> Any:
    """Division by a constant, which is a product."""
    divisor = constant_of(inputs(n)[1])
    if not divisor or not math.isfinite(divisor):
        return None
    dtype, given = dtype_of(n), e.carried(n, 0, i, dtype_of(n))
    if given is None:
        return None
    by, given = number(divisor), overflowed(as_number(given), _computed_in(dtype))
    value = overflowed(sympy.piecewise_fold(given / by), dtype)
    known = [leaf for leaf in leaves(value) if is_held(leaf, dtype)] if not is_held(by, dtype) else []
    if any(leaf != 0 for leaf in known) or held_by(divisor, torch.float32) in (0, math.inf, -math.inf):
        return None  # numbers that the divisor, which is rounded itself, would not give
    exact = _is_exact(value, dtype, given) and all(_is_exact_pair(_quotient, x, by, dtype) for x in leaves(given))
    return value if exact else None


def _quotient(x: Any, y: Any) -> Any:
    return x / y


def _rule_log(e: Evaluator, n: Node, i: Index) -> Any:
    """The logarithm of known numbers, such as a mask's 0 and 1."""
    given = as_number(e.operand(n, 0, i))
    pieces = given.args if isinstance(given, sympy.Piecewise) else ((given, sympy.true),)
    if not all(value in (0, 1) for value, _ in pieces):
        return None
    logs = [(sympy.Integer(0) if value == 1 else -sympy.oo, condition) for value, condition in pieces]
    return sympy.Piecewise(*logs)


def _rule_abs(e: Evaluator, n: Node, i: Index) -> Any:
    """The magnitude of an index or a small integer."""
    given = as_number(e.operand(n, 0, i))
    if dtype_of(n) != torch.int64:
        return None
    value = sympy.piecewise_fold(sympy.Abs(given))
    return value if all(is_held(leaf, torch.int64) for leaf in leaves(value)) else None


def _rule_floor_divide(e: Evaluator, n: Node, i: Index) -> Any:
    """An integer divided by a constant, rounded down."""
    divisor = constant_of(inputs(n)[1])
    rounded = n.target is aten.floor_divide.default or n.kwargs.get("rounding_mode") == "floor"
    if not rounded or dtype_of(n) != torch.int64 or not divisor or divisor < 1 or not divisor.is_integer():
        return None
    return sympy.piecewise_fold(sympy.floor(as_number(e.operand(n, 0, i)) / int(divisor)))


def _rule_not(e: Evaluator, n: Node, i: Index) -> Any:
    given = e.carried(n, 0, i, torch.bool)
    return None if given is None or dtype_of(n) != torch.bool else sympy.Not(as_bool(given))


def _rule_cumsum(e: Evaluator, n: Node, i: Index) -> Any:
    """A sum over the places up to one's own, of an integer that is the same at every place."""
    dim = normal_dim(inputs(n)[1], len(i))
    at = Place(f"{name_of(n)}_at", integer=True, nonnegative=True)  # a sum of sums runs over two
    term = as_number(e.value(inputs(n)[0], (*i[:dim], at, *i[dim + 1 :])))
    total = term * (i[dim] + 1)
    return total if term.is_integer and term.is_number and _is_exact(total, dtype_of(n)) else None


def _rule_diff(e: Evaluator, n: Node, i: Index) -> Any:
    """Differences of neighbours, and of the first from a number put before it."""
    times, dim, first = arg(n, 1, "n", 1), normal_dim(arg(n, 2, "dim", -1), len(i)), arg(n, 3, "prepend")
    if times != 1 or arg(n, 4, "append") is not None or (first is not None and shape_of(first)[dim] != 1):
        return None

    def at(node: Node, place: Any) -> Any:
        return as_number(e.value(node, (*i[:dim], place, *i[dim + 1 :])))

    source, place = inputs(n)[0], i[dim] if first is not None else i[dim] + 1
    before, own = at(source, place - 1), at(source, place)
    result = own - before
    if first is not None:
        top, zero = at(source, sympy.Integer(0)), at(first, sympy.Integer(0))
        result = sympy.Piecewise((top - zero, sympy.Eq(place, 0)), (result, True))
    return result if dtype_of(n) == torch.int64 and _is_exact(result, dtype_of(n)) else None


RULES: dict[object, Rule] = {
    **VIEW_RULES,
    **dict.fromkeys(CASTS_AND_COPIES, _same),
    **dict.fromkeys((aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default), _filled(0)),
    **dict.fromkeys((aten.ones.default, aten.ones_like.default, aten.new_ones.default), _filled(1)),
    aten.full.default: _rule_full(1),
    aten.full_like.default: _rule_full(1),
    aten.new_full.default: _rule_full(2),
    aten.neg.default: _rule_negative,
    aten.log.default: _rule_log,
    aten.cumsum.default: _rule_cumsum,
    aten.diff.default: _rule_diff,
    aten.abs.default: _rule_abs,
    **dict.fromkeys((aten.floor_divide.default, aten.div.Tensor_mode, aten.div.Scalar_mode), _rule_floor_divide),
    **dict.fromkeys((aten.div.Tensor, aten.div.Scalar), _rule_divide),
    aten.tril.default: _rule_triangle(lower=True),
    aten.triu.default: _rule_triangle(lower=False),
    **dict.fromkeys((aten.eq.Tensor, aten.eq.Scalar), _compare(sympy.Eq)),
    **dict.fromkeys((aten.ne.Tensor, aten.ne.Scalar), _compare(sympy.Ne)),
    **dict.fromkeys((aten.lt.Tensor, aten.lt.Scalar), _compare(sympy.Lt)),
    **dict.fromkeys((aten.le.Tensor, aten.le.Scalar), _compare(sympy.Le)),
    **dict.fromkeys((aten.gt.Tensor, aten.gt.Scalar), _compare(sympy.Gt)),
    **dict.fromkeys((aten.ge.Tensor, aten.ge.Scalar), _compare(sympy.Ge)),
    **dict.fromkeys((aten.bitwise_and.Tensor, aten.logical_and.default), _logical(sympy.And)),
    **dict.fromkeys((aten.bitwise_or.Tensor, aten.logical_or.default), _logical(sympy.Or)),
    **dict.fromkeys((aten.bitwise_not.default, aten.logical_not.default), _rule_not),
    **dict.fromkeys((aten.add.Tensor, aten.add.Scalar), _arithmetic(lambda x, y: x + y)),
    **dict.fromkeys((aten.sub.Tensor, aten.sub.Scalar), _arithmetic(lambda x, y: x - y)),
    **dict.fromkeys((aten.rsub.Scalar, aten.rsub.Tensor), _arithmetic(lambda x, y: y - x)),
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar), _arithmetic(lambda x, y: x * y)),
    **dict.fromkeys((aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar), _rule_where),
    **dict.fromkeys((aten.masked_fill.Scalar, aten.masked_fill.Tensor), _rule_masked_fill),
}
