"""Equations of einsum, read letter by letter."""

from __future__ import annotations

import string

from torch.fx import Node

from monarch_compile.passes.graph import inputs, shape_of


def einsum_letters(node: Node) -> tuple[list[tuple[Node, str]], str]:
    """Every operand with its letters, and the output's, ellipses written out; no operands for an odd equation."""
    equation, operands = inputs(node)[0], inputs(node)[1]
    if not isinstance(equation, str) or not isinstance(operands, (list, tuple)):
        return [], ""
    left, arrow, out = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(operands):
        return [], ""
    if not arrow:  # an implicit output: the ellipsis, then every letter that occurs once
        letters = left.replace(".", "").replace(",", "")
        out = "..." * ("..." in left) + "".join(sorted(c for c in letters if letters.count(c) == 1))
    nodes = [n for n in operands if isinstance(n, Node)]
    spare = "".join(c for c in string.ascii_letters if c not in equation)
    hidden = [len(shape_of(n)) - len(t.replace("...", "")) for n, t in zip(nodes, terms, strict=True) if "..." in t]
    width = max(hidden, default=0)
    named = []
    for n, t in zip(nodes, terms, strict=True):
        own = len(shape_of(n)) - len(t.replace("...", ""))
        letters = t.replace("...", spare[width - own : width] if "..." in t else "")
        if len(letters) != len(shape_of(n)) or len(set(letters)) != len(letters):
            return [], ""
        named.append((n, letters))
    return named, out.replace("...", spare[:width])
