"""The frontend of long convolutions."""

from __future__ import annotations

from torch.fx import Node

from monarch_compile.convolution.op import CONVOLUTION_OP
from monarch_compile.passes.convolution.choose import FAMILY, choose
from monarch_compile.passes.convolution.lower import lower
from monarch_compile.passes.convolution.match import find_sites
from monarch_compile.passes.convolution.short_sums import short_convolutions_to_sums
from monarch_compile.passes.frontends import Frontend
from monarch_compile.passes.state import Choice, Pass


def _lower(choice: Choice) -> Node:
    return lower(choice.region, choice.ir)


FRONTEND = Frontend(
    family=FAMILY,
    op=CONVOLUTION_OP,
    num_tensors=5,
    laid_out=lambda x: x.new_empty(x.shape),
    find=find_sites,
    choose=choose,
    lower=_lower,
    finish=(Pass("short_convolutions_to_sums", short_convolutions_to_sums),),
)
