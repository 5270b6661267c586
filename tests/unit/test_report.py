"""`explain` and its report: sites, tables, graphs and the page."""

import json
import re
from html.parser import HTMLParser

import networkx as nx
import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from monarch_compile.attention.form import Form
from monarch_compile.attention.ir import MonarchAttention
from monarch_compile.decision import Decision
from monarch_compile.errors import ConfigError
from monarch_compile.report.explainer import explain
from monarch_compile.report.graphs import MAX_NODES, site_windows, to_svg
from monarch_compile.report.report import site_of

ALWAYS = {"policy": "always"}


class Attention(nn.Module):
    """Self-attention spelled as two products and a softmax, or through SDPA; optionally under a causal mask."""

    def __init__(self, dim=32, heads=2, *, fused=False, causal=False):
        super().__init__()
        self.heads, self.fused, self.causal = heads, fused, causal
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        batch, seq_len, dim = x.shape
        q, k, v = self.qkv(x).view(batch, seq_len, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        if self.fused:
            mixed = scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        else:
            mixed = (q @ k.transpose(-1, -2) / (dim // self.heads) ** 0.5).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).reshape(batch, seq_len, dim))


class Model(nn.Module):
    """Three attention sites, the last of them causal."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = Attention(), Attention(fused=True), Attention(fused=True, causal=True)

    def forward(self, x):
        x = x + self.first(x)
        return self.third(x + self.second(x))


@pytest.fixture(scope="module")
def report():
    with torch.no_grad():
        return explain(Model().eval(), torch.randn(2, 64, 32), options={**ALWAYS, "block_size": 8})


def test_sites_are_named_and_in_order(report):
    assert [site.name.split()[0] for site in report.sites] == ["first", "second", "third"]
    assert [site.status for site in report.sites] == ["lowered", "lowered", "exact"]
    assert report.summary == "2 of 3 attention sites lowered in 1 graph"


def test_a_lowered_site_carries_everything(report):
    site = report.sites[0]
    assert site.lowered
    assert site.code == "lowered"
    assert site.block_size == 8
    assert site.ir.num_blocks == 8
    assert site.q_shape == site.k_shape == site.v_shape == (2, 2, 64, 16)
    assert (site.shape, site.noun) == ("2x2x64x16", "attention site")
    assert site.exact.flops == 4 * 64**2 * 16 * 2 * 2
    assert site.monarch.flops == (6 * 8 + 4 * 8 + 4 * 16) * 64 * 16 * 2 * 2  # the window adds 16 keys a row
    assert site.predicted_speedup == site.exact_s / site.monarch_s
    assert [kernel.file_name.endswith(".py") for kernel in site.kernels] == [True, True]
    assert "the reference runs instead" in site.kernel_note


def test_an_exact_site_says_why_and_still_has_its_cost(report):
    site = report.sites[2]
    assert "causal" in site.reason
    assert site.exact.flops == report.sites[0].exact.flops
    assert site.monarch is None
    assert site.predicted_speedup is None
    assert site.kernels == ()


def test_table_is_aligned_and_gives_reasons(report):
    header, rule, first, second, third, why, remedy, blocks, summary = str(report).splitlines()
    assert set(rule) == {"-"}
    assert len({line.index(status) for line, status in ((header, "status"), (first, "lowered"), (third, "exact"))}) == 1
    assert second.split()[0] == "second"
    assert blocks == f"blocks of 2 sites: {report.sites[0].blocking}"
    assert report.sites[1].blocking.startswith(
        "no token grid: the token axis is no known grid: it comes from an argument"
    )
    assert why.strip().startswith(f"exact because: {report.sites[2].reason} [")
    assert remedy.strip() == f"would lower with: {report.sites[2].remedy}"
    assert summary == report.summary


def test_dict_is_json_and_complete(report):
    content = json.loads(json.dumps(report.to_dict()))
    assert [site["status"] for site in content["sites"]] == ["lowered", "lowered", "exact"]
    assert content["sites"][0]["ir"] == str(report.sites[0].ir)
    assert content["sites"][0]["exact"]["flops"] == report.sites[0].exact.flops
    assert content["sites"][2]["monarch"] is None


def test_graphs_show_the_rewrite(report):
    before, after = report.graph.before, report.graph.after
    assert nx.is_directed_acyclic_graph(before)
    assert nx.is_directed_acyclic_graph(after)
    softmax = [data for _, data in before.nodes(data=True) if "softmax" in data["target"]]
    assert [(data["role"], data["shape"]) for data in softmax] == [("replaced", "float32[2, 2, 64, 64]")]
    assert sum(role == "monarch" for _, role in after.nodes(data="role")) == 2
    assert not any(role == "monarch" for _, role in before.nodes(data="role"))


def test_window_holds_the_site_and_its_operands(report):
    site = report.sites[0]
    before, after = site_windows(report.graph.before, report.graph.after, f"0/{site.node}")
    assert any("softmax" in target for _, target in before.nodes(data="target"))
    assert [role for _, role in after.nodes(data="role")].count("monarch") == 1
    assert 0 < len(after) < len(before) <= MAX_NODES
    svg = to_svg(before)
    assert svg.count("<rect") == len(before)
    assert svg.count('class="edge"') == before.number_of_edges()


def test_drawn_boxes_do_not_overlap(report):
    svg = to_svg(site_windows(report.graph.before, report.graph.after, f"0/{report.sites[0].node}")[0])
    boxes = [
        tuple(map(float, box)) for box in re.findall(r'<rect x="(.*?)" y="(.*?)" width="(.*?)" height="(.*?)"', svg)
    ]
    for i, (x, y, w, h) in enumerate(boxes):
        for other_x, other_y, other_w, other_h in boxes[i + 1 :]:
            assert x + w <= other_x or other_x + other_w <= x or y + h <= other_y or other_y + other_h <= y


def test_page_is_self_contained_and_escaped(report, tmp_path):
    text = report.save(tmp_path / "folder" / "report.html").read_text(encoding="utf-8")

    links: list[str] = []

    class Links(HTMLParser):
        def handle_starttag(self, tag, attrs):
            assert tag not in ("script", "link", "img", "iframe")
            links.extend(value for name, value in attrs if name in ("href", "src"))

    Links().feed(text)
    assert links
    assert all(link.startswith("#") for link in links)
    assert "http" not in re.sub(r"<pre>.*?</pre>", "", text, flags=re.DOTALL)
    assert report.summary in text
    assert "monarch.attention&lt;f32&gt;" in text
    assert report.sites[0].kernels[0].file_name in text


def test_no_attention():
    report = explain(nn.Linear(4, 4), torch.randn(2, 4))
    assert report.summary == "no attention site, long convolution or block linear found in 1 graph"
    assert str(report) == report.summary
    assert report.sites == ()


def test_graph_breaks_are_counted(tmp_path):
    first, second = Attention().eval(), Attention().eval()

    def broken(x):
        x = first(x)
        torch._dynamo.graph_break()
        return second(x)

    with torch.no_grad():
        report = explain(broken, torch.randn(1, 32, 32), options=ALWAYS)
    assert report.num_graphs == 2
    assert [site.graph for site in report.sites] == [0, 1]
    assert report.summary == "2 of 2 attention sites lowered in 2 graphs"
    assert report.save(tmp_path / "report.html").stat().st_size > 0


def test_short_sequences_stay_exact_by_default():
    with torch.no_grad():
        report = explain(Attention().eval(), torch.randn(1, 64, 32))
    (site,) = report.sites
    assert (site.status, site.code) == ("exact", "cost_exact_wins")
    assert site.predicted_speedup < 1.1
    assert site.kernels == ()


def test_explaining_leaves_model_and_compiled_forms_alone():
    model = Attention().train()
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(1, 32, 32)
    compiled(x)
    torch._dynamo.utils.counters.clear()
    report = explain(compiled, x, options=ALWAYS)
    assert report.summary.startswith("1 of 1")
    assert model.training
    torch._dynamo.utils.counters.clear()
    compiled(x)
    assert not torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_each_call_is_explained_with_its_own_shapes():
    model = Attention().eval()
    with torch.no_grad():
        lengths = [explain(model, torch.randn(1, n, 32), options=ALWAYS).sites[0].q_shape[2] for n in (32, 48, 64)]
    assert lengths == [32, 48, 64]


def test_keyword_arguments_reach_the_model():
    def attend(q, *, k, v):
        return scaled_dot_product_attention(q, k, v)

    q, k, v = torch.randn(3, 1, 2, 32, 8)
    assert explain(attend, q, k=k, v=v, options=ALWAYS).summary == "1 of 1 attention sites lowered in 1 graph"


def test_bad_options_are_refused():
    with pytest.raises(ConfigError, match="polic"):
        explain(nn.Linear(4, 4), torch.randn(2, 4), options={"policy": "sometimes"})


def test_symbolic_sites_print_and_serialise():
    ir = MonarchAttention("s0", 2, 2, "s1", "s1", 16, 16, torch.float32, Form(8), 0.25)
    shape = ("s0", 2, "s1", 16)
    decision = Decision(
        "attention", "site", "lowered", "lowered", "lowered", "why", "node", "", ir, shape, shape, shape, ir.dtype
    )
    site = site_of(decision)
    assert site.predicted_speedup is None
    assert json.loads(json.dumps(site.to_dict()))["exact"]["flops"] == "128*s0*s1**2"
    assert site_of(decision, {"s0": 1, "s1": 4096}).predicted_speedup > 1


def test_a_site_without_a_kernel_says_why():
    ir = MonarchAttention(1, 2, 2, 64, 64, 512, 512, torch.float32, Form(8), 0.25)
    site = site_of(Decision("attention", "site", "lowered", "lowered", "lowered", "why", "node", ir=ir))
    assert site.kernels == ()
    assert "512" in site.kernel_note
