"""Tests of programs that older versions of torch do not run."""

from __future__ import annotations

import pytest
import torch

OLDER = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)

writes_in_bodies = pytest.mark.xfail(OLDER, reason="Dynamo of torch 2.11 refuses bodies that write to their inputs")
sharded_heads = pytest.mark.xfail(OLDER, reason="DTensor of torch 2.11 multiplies no matrices whose heads are sharded")
hooks_that_read_tensors = pytest.mark.xfail(OLDER, reason="Dynamo of torch 2.11 reads inputs too early")
