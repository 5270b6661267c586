"""lower_exported: a program that is valid, that travels, and that gives the backend's numbers."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from support.capture import run_passes
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from monarch_compile import ConfigError, LoweringError, lower_exported, monarch_attention
from monarch_compile.attention.op import ATTENTION_OP

OPTIONS = {"policy": "always", "block_size": 7}


class Block(nn.Module):
    """Self-attention that also counts its calls in a buffer."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out, self.causal = nn.Linear(24, 72), nn.Linear(24, 24), causal
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        batch, seq_len, _ = x.shape
        self.calls += 1
        q, k, v = (4 * self.qkv(x)).view(batch, seq_len, 3, 3, -1).permute(2, 0, 3, 1, 4)
        mask = None if self.causal else visible[:, None, None, :]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(batch, seq_len, 24))


class Alone(nn.Module):
    """The attention is the output itself."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


def _inputs(seq_len: int = 41) -> tuple[Tensor, Tensor]:
    x = torch.randn(2, seq_len, 24, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(seq_len) < torch.tensor([[seq_len], [seq_len - 9]])


def _sites(program: ExportedProgram) -> int:
    return len(program.graph.find_nodes(op="call_function", target=ATTENTION_OP))


@pytest.fixture
def lowered() -> ExportedProgram:
    return lower_exported(export(Block().eval(), _inputs()), OPTIONS | {"strict": True})


def _run(program: ExportedProgram) -> Tensor:
    with torch.no_grad():
        return program.module()(*_inputs())


@pytest.mark.parametrize("form", [{}, {"num_iters": 2, "init": "mean", "pad": "pre", "window": None}], ids=str)
def test_the_numbers_of_the_backend(form: dict[str, object]) -> None:
    model, inputs = Block().eval(), _inputs()
    program = export(model, inputs)
    with torch.no_grad():
        expected, (rewrite,) = run_passes(model, *inputs, **OPTIONS | form)
        exact = model(*inputs)
    before = str(program.graph)
    found = lower_exported(program, OPTIONS | form)
    found.validate()
    assert (rewrite.num_lowered, _sites(found), _sites(program)) == (1, 1, 0)
    assert str(program.graph) == before
    torch.testing.assert_close(_run(found), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(_run(found), exact, atol=1e-3)


def test_buffers_are_still_written(lowered: ExportedProgram) -> None:
    module = lowered.module()
    for _ in range(3):
        module(*_inputs())
    assert module.calls == 3


def test_every_node_has_its_value(lowered: ExportedProgram) -> None:
    nodes = [node for node in lowered.graph.nodes if node.op != "output"]
    assert all("val" in node.meta for node in nodes)
    op = next(iter(lowered.graph.find_nodes(op="call_function", target=ATTENTION_OP)))
    assert op.meta["val"].shape == (2, 3, 41, 8)


def test_a_site_that_is_the_output() -> None:
    q, k, v = torch.randn(3, 2, 3, 41, 8, generator=torch.Generator().manual_seed(0))
    found = lower_exported(export(Alone(), (q, k, v)), OPTIONS)
    assert _sites(found) == 1
    torch.testing.assert_close(found.module()(q, k, v), run_passes(Alone(), q, k, v, **OPTIONS)[0])


def test_a_dynamic_length() -> None:
    shapes = {"x": {1: Dim("n", min=8, max=256)}, "visible": {1: Dim("n", min=8, max=256)}}
    model = Block().eval()
    found = lower_exported(export(model, _inputs(), dynamic_shapes=shapes), OPTIONS | {"strict": True})
    with torch.no_grad():
        for seq_len in (41, 64, 100):
            inputs = _inputs(seq_len)
            expected, _ = run_passes(model, *inputs, **OPTIONS)
            torch.testing.assert_close(found.module()(*inputs), expected, rtol=1e-5, atol=1e-5)


def test_a_dynamic_length_needs_a_number_for_block_size() -> None:
    """A block size of the example's own length would be silently that of every other."""
    shapes = {"x": {1: Dim("n", min=8, max=4096)}, "visible": {1: Dim("n", min=8, max=4096)}}
    program = export(Block().eval(), _inputs(), dynamic_shapes=shapes)
    with pytest.raises(LoweringError, match="dynamic_seq_len"):
        lower_exported(program, {"policy": "always", "strict": True})


def test_an_example_of_one_block_says_nothing_of_longer_ones() -> None:
    """What is compiled ahead of time for one block of keys would be wrong for several: nothing checks the length."""
    model, n = Block().eval(), Dim("n", min=2, max=256)
    for example, length, lowers in ((41, n, False), (65, n, True), (41, Dim("n", min=2, max=64), True)):
        program = export(model, _inputs(example), dynamic_shapes={"x": {1: length}, "visible": {1: length}})
        assert _sites(lower_exported(program, {"policy": "always", "block_size": 64})) == lowers


class ByHand(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * 8**-0.5).softmax(-1) @ v


def test_lengths_are_equal_where_one_dim_says_so() -> None:
    """An exported program takes no guards: lengths that are merely dynamic may differ."""
    example, other = (torch.randn(3, 1, 2, n, 8).unbind() for n in (64, 100))
    alike, apart = ({name: {2: dim} for name in ("q", "k", "v")} for dim in (Dim("n", min=8, max=4096), Dim.AUTO))
    program = export(ByHand().eval(), example, dynamic_shapes=alike)
    found = lower_exported(program, OPTIONS)
    torch.testing.assert_close(found.module()(*other), monarch_attention(*other, block_size=7), rtol=1e-5, atol=1e-5)
    with pytest.raises(LoweringError, match="may differ, and an exported program"):
        lower_exported(export(ByHand().eval(), example, dynamic_shapes=apart), OPTIONS | {"strict": True})


class Gate(nn.Module):
    """Softmax between two layers: their weights are inputs of the exported graph, but neither keys nor values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 41), nn.Linear(41, 24)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        return self.second(self.first(x).softmax(-1))


def test_weights_of_layers_are_no_keys() -> None:
    program = export(Gate().eval(), _inputs())
    assert lower_exported(program, OPTIONS | {"strict": True}) is program
    assert not any("monarch_compile_weight" in node.meta for node in program.graph.nodes)


def test_the_modules_that_docs_name_register_every_operator() -> None:
    """In a process that compiled nothing, as one that loads a program."""
    script = (
        "import torch, monarch_compile.attention.op, monarch_compile.convolution.op as _\n"
        "torch.ops.monarch_compile.attention.default, torch.ops.monarch_compile.long_convolution.default"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_it_travels(lowered: ExportedProgram) -> None:
    expected, file = _run(lowered), io.BytesIO()
    torch.export.save(lowered, file)
    file.seek(0)
    loaded = torch.export.load(file)
    assert _sites(loaded) == 1
    assert torch.equal(_run(loaded), expected)
    assert torch.equal(_run(copy.deepcopy(lowered)), expected)
    state = pickle.loads(pickle.dumps(lowered.state_dict))
    assert set(state) == set(Block().state_dict())
    assert all(torch.equal(state[name], value) for name, value in lowered.state_dict.items())


def test_a_causal_program_is_returned_itself() -> None:
    model = Block(causal=True).eval()
    program = export(model, _inputs())
    assert lower_exported(program, OPTIONS) is program
    with torch.no_grad():
        torch.testing.assert_close(_run(program), model(*_inputs()))
    with pytest.raises(LoweringError, match="mask_causal"):
        lower_exported(program, OPTIONS | {"strict": True})


def test_the_cost_model_is_asked() -> None:
    program = export(Block().eval(), _inputs())
    assert lower_exported(program) is program


@pytest.mark.parametrize("options", [{"mode": "reduce-overhead"}, {"max_autotune": True}, {"autotune": True}])
def test_options_without_a_use_raise(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        lower_exported(export(Block().eval(), _inputs()), options)
