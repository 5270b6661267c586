"""Reports, errors and logs speak of each family in its own words, and of none that has no site."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fft import irfft, rfft
from torch.fx import GraphModule
from torch.nn.functional import scaled_dot_product_attention

from monarch_compile import calibrate, explain
from monarch_compile.backend import rewritten
from monarch_compile.calls import launcher_of
from monarch_compile.config import MonarchConfig
from monarch_compile.convolution import work
from monarch_compile.convolution.ir import LongConvolution
from monarch_compile.decision import Decision
from monarch_compile.family import families, lowered_in_words, sites_in_words
from monarch_compile.report.kernels import kernels_of
from monarch_compile.report.report import Report, site_of
from tests.support.capture import decisions_of

LENGTH = 32
ALWAYS = {"policy": "always", "block_size": 8}


def convolved(u: Tensor, k: Tensor) -> Tensor:
    n = 2 * u.shape[-1]
    return irfft(rfft(u, n=n) * rfft(k, n=n), n=n)[..., : u.shape[-1]]


def divided(u: Tensor, k: Tensor) -> Tensor:
    n = 2 * u.shape[-1]
    return irfft(rfft(u, n=n) / rfft(k, n=n), n=n)[..., : u.shape[-1]]


def mixed(u: Tensor, k: Tensor) -> Tensor:
    """An attention, one that is causal, a convolution, and what is nearly one."""
    q = u[:, None].mT
    attended = scaled_dot_product_attention(q, q, q) + scaled_dot_product_attention(q, q, q, is_causal=True)
    return attended[:, 0].mT + convolved(u, k) + divided(u, k)


def given() -> tuple[Tensor, Tensor]:
    """(batch, channels, length) and (channels, length)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 4, LENGTH, generator=generator), torch.randn(4, LENGTH, generator=generator)


@pytest.fixture(scope="module")
def report() -> Report:
    return explain(mixed, *given(), options=ALWAYS)


def convolution(**changes: Any) -> LongConvolution:
    sizes: dict[str, Any] = {
        "batch": 16,
        "channels": 768,
        "seq_len": 4096,
        "filter_len": 4000,
        "transform_len": 8192,
        "out_len": 4096,
        "lag": 0,
        "dtype": torch.bfloat16,
        "filter_dtype": torch.float32,
        "out_dtype": torch.bfloat16,
    }
    return LongConvolution(**{**sizes, **changes})


def decision_of(ir: LongConvolution, device: str = "cuda") -> Decision:
    words = {"status": "lowered", "stage": "lowered", "code": "lowered", "reason": "", "node": "irfft"}
    return Decision(family="convolution", name="filter", ir=ir, dtype=ir.dtype, device=device, **words)


# ---- counts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sites", "words"),
    [
        ([], "no site"),
        (["attention"], "1 attention site"),
        (["convolution"] * 2, "2 long convolutions"),
        (["convolution", "attention", "convolution"], "1 attention site and 2 long convolutions"),
    ],
)
def test_sites_in_words(sites: list[str], words: str) -> None:
    assert sites_in_words(sites) == words


def test_three_families_are_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    import monarch_compile.family as module

    own = families()
    third = module.replace(own[0], name="third", noun="gate")
    monkeypatch.setattr(module, "families", lambda: (*own, third))
    assert sites_in_words(["third", "convolution", "attention"]) == "1 attention site, 1 long convolution and 1 gate"


@pytest.mark.parametrize(
    ("sites", "words"),
    [
        ([("attention", True)], "1 of 1 attention sites"),
        ([("convolution", False)], "0 of 1 long convolutions"),
        (
            [("convolution", True), ("attention", True), ("attention", False)],
            "1 of 2 attention sites and 1 of 1 long convolutions",
        ),
    ],
)
def test_lowered_in_words(sites: list[tuple[str, bool]], words: str) -> None:
    assert lowered_in_words(sites) == words


# ---- reports ---------------------------------------------------------------------------------------------------------


def test_the_summary_counts_each_family(report: Report) -> None:
    assert report.summary == "1 of 2 attention sites and 1 of 2 long convolutions lowered in 1 graph"
    assert json.loads(json.dumps(report.to_dict()))["summary"] == report.summary


def test_a_family_without_sites_is_not_named() -> None:
    found = explain(convolved, *given(), options=ALWAYS)
    assert found.summary == "1 of 1 long convolutions lowered in 1 graph"
    assert "attention" not in str(found)


def test_the_table_has_the_shapes_of_both(report: Report) -> None:
    attention, _, lowered, refused = report.sites
    assert (attention.shape, lowered.shape, refused.shape) == ("2x1x32x4", "2x4x32, filter 32", "")
    lines = str(report).splitlines()
    assert "shape" in lines[0].split()
    assert "q shape" not in lines[0]
    (row,) = [line for line in lines if "filter 32" in line]
    assert row.index("2x4x32") == lines[0].index("shape")
    assert [site["shape"] for site in report.to_dict()["sites"]][2] == "2x4x32, filter 32"


def test_attention_of_unequal_lengths_shows_both() -> None:
    q, k = torch.randn(1, 1, 8, 4), torch.randn(1, 1, 12, 4)
    (site,) = explain(lambda q, k: scaled_dot_product_attention(q, k, k), q, k).sites
    assert site.shape == "1x1x8x4 on 12"


def test_the_page_speaks_of_both(report: Report, tmp_path: Path) -> None:
    text = report.save(tmp_path / "report.html").read_text(encoding="utf-8")
    assert report.summary in text
    assert "<td>2x4x32, filter 32</td>" in text
    assert "Long convolution: " in text
    assert "Attention site: " in text
    assert text.count("exponentials") == 2, "those of attention alone"
    assert "attention alone" not in text


def test_costs_of_a_convolution_are_numbers(report: Report) -> None:
    content = report.to_dict()["sites"][2]
    assert all(isinstance(content[form][name], int) for form in ("exact", "monarch") for name in ("flops", "bytes"))


def test_symbolic_sizes_are_shown() -> None:
    decision = decision_of(convolution(batch="s0"))
    site = site_of(decision)
    assert site.shape == "s0x768x4096, filter 4000"
    json.dumps(site.to_dict())


@pytest.mark.parametrize(
    "changes",
    [
        {"out_dtype": torch.float32},
        {"dtype": torch.float32},
        {"seq_len": 1 << 21, "transform_len": 1 << 22},
        {"seq_len": "s1", "out_len": "s1", "transform_len": "2*s1", "out_dtype": torch.float32},
    ],
)
def test_no_kernel_is_shown_that_does_not_run(changes: dict[str, Any]) -> None:
    kernels, note = kernels_of(convolution(**changes))
    assert kernels == ()
    assert note.startswith("torch.fft computes it")


def test_an_older_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "has_kernels", lambda device: False)
    kernels, note = kernels_of(convolution())
    assert kernels == ()
    assert "compute capability 9.0 or later" in note


def test_kernels_that_run_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "has_kernels", lambda device: True)
    site = site_of(decision_of(convolution()))
    assert site.kernels
    assert site.kernel_note == ""
    assert "the reference runs instead" in site_of(decision_of(convolution(), device="cpu")).kernel_note


# ---- strict mode -----------------------------------------------------------------------------------------------------


def strictly(program: Callable[..., Any], *inputs: Tensor) -> None:
    config = MonarchConfig(policy="always", strict=True, block_size=8)

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Any:
        rewritten(gm, example_inputs, config, launcher_of())
        return gm.forward

    torch._dynamo.reset()
    torch.compile(program, backend=backend, fullgraph=True)(*inputs)


def test_strict_mode_names_the_families_it_misses() -> None:
    with pytest.raises(Exception, match="strict=True and 1 attention site and 1 long convolution cannot be lowered"):
        strictly(mixed, *given())
    with pytest.raises(Exception, match="strict=True and 1 long convolution cannot be lowered"):
        strictly(divided, *given())
    strictly(convolved, *given())


# ---- remedies --------------------------------------------------------------------------------------------------------


def counted(u: Tensor, k: Tensor) -> Tensor:
    return convolved(u.to(torch.int32), k)


def switched(u: Tensor, k: Tensor) -> Tensor:
    n = 2 * u.shape[-1]
    with torch.no_grad():
        spectrum = rfft(u, n=n)
    return irfft(spectrum * rfft(k, n=n), n=n)


def written(u: Tensor, k: Tensor) -> Tensor:
    n = 2 * u.shape[-1]
    spectrum = rfft(u, n=n)
    u.zero_()
    return irfft(spectrum * rfft(k, n=n), n=n)


@pytest.mark.parametrize(("program", "code"), [(counted, "dtype"), (switched, "context"), (written, "mutation")])
def test_the_remedy_of_a_convolution_speaks_of_no_queries(program: Callable[..., Any], code: str) -> None:
    u, k = given()
    (decision,) = decisions_of(program, u, k.requires_grad_())
    assert decision.code == code
    assert not any(word in decision.remedy for word in ("queries", "keys", "the attention"))


# ---- what is exact up to rounding is not measured --------------------------------------------------------------------


def test_a_convolution_has_no_error_and_no_place_in_a_plan() -> None:
    measured = explain(mixed, *given(), options=ALWAYS, measure=True)
    assert [(site.family, site.error is None) for site in measured.sites] == [
        ("attention", False),
        ("attention", True),
        ("convolution", True),
        ("convolution", True),
    ]
    plan = calibrate(mixed, [given()], budget=1.0, progress=False)
    assert [site.name for site in plan.sites] == [site.name for site in measured.sites if site.family == "attention"]
    assert "of 2 sites lowered" in str(plan)
    options = {"plan": plan, "policy": "always"}
    assert [site.status for site in explain(mixed, *given(), options=options).sites][2] == "lowered"
