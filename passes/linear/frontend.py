"""The frontend of block linears."""

from __future__ import annotations

from torch.fx import Node

from monarch_compile.linear.op import LINEAR_OP
from monarch_compile.passes.frontends import Frontend
from monarch_compile.passes.linear.choose import FAMILY, choose
from monarch_compile.passes.linear.lower import lower
from monarch_compile.passes.linear.match import find_sites
from monarch_compile.passes.state import Choice


def _lower(choice: Choice) -> Node:
    return lower(choice.region, choice.ir, choice.details)


FRONTEND = Frontend(
    family=FAMILY,
    op=LINEAR_OP,
    num_tensors=5,
    laid_out=lambda x: x.new_empty(x.shape),
    find=find_sites,
    choose=choose,
    lower=_lower,
)
