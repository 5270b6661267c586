"""Over buffers between margins of NaN: nothing is read past a buffer, whatever lengths and batches come after another.

`python -m tests.dynamic_programs` compares many more programs, `--device cuda` on a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from monarch_compile.backend import monarch
from tests.support.block import Block
from tests.support.dynamic_programs import DynamicProgram, worst_error
from tests.support.poison import Poisoned, between_margins


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


class TwoLayers(nn.Module):
    """Attention twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(64, 2), Block(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x + self.first(x))

    def by_reference(self, x: Tensor, **form: object) -> Tensor:
        return self.second.by_reference(x + self.first.by_reference(x, **form), **form)


@pytest.mark.parametrize("window", [1, pytest.param(0, marks=pytest.mark.nightly)])
def test_lengths_of_one_block_one_after_another(window: int, poisoned: Poisoned) -> None:
    """The number of blocks is 1 by a guard alone there: Inductor once read masks of it by the batch."""
    model, form = TwoLayers().eval(), {"block_size": 64, "window": window}
    compiled = torch.compile(model, backend=monarch, dynamic=True, options={"policy": "always", **form})
    with torch.no_grad():
        for batch, seq_len in ((8, 40), (8, 50), (8, 33), (2, 61), (3, 200)):
            for _ in range(3):
                x = between_margins(torch.randn(batch, seq_len, 64))
                torch.testing.assert_close(compiled(x), model.by_reference(x, **form), rtol=1e-5, atol=1e-5)
    assert poisoned.num_buffers


@pytest.mark.parametrize("seed", [*(pytest.param(n, marks=pytest.mark.nightly) for n in (1, 4)), 9])
def test_random_dynamic_programs(seed: int) -> None:
    program = DynamicProgram.draw(seed)

    def compile_model(model: Any, options: dict[str, Any]) -> Any:
        return torch.compile(model, backend=monarch, options=options)

    assert worst_error(program, "cpu", compile_model) < 1e-4, program


def test_what_is_read_past_a_buffer_shows() -> None:
    x = between_margins(torch.randn(3, 5))
    assert x.as_strided((1,), (1,), x.storage_offset() + 15).isnan()
    assert x.as_strided((1,), (1,), x.storage_offset() - 1).isnan()
    assert not x.isnan().any()


def test_what_is_written_past_a_buffer_is_noted() -> None:
    poisoned = Poisoned()
    for place, noted in ((15, 0), (16, 1), (-1, 1)):
        del poisoned.overwritten[:]
        buffer = poisoned.empty_strided((4, 4), (4, 1), torch.float32, "cpu")
        buffer.as_strided((1,), (1,), buffer.storage_offset() + place).zero_()
        del buffer
        assert len(poisoned.overwritten) == noted
