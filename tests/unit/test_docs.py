"""What README, CONTRIBUTING and docs/ say agrees with the code, with the files they link and with recorded numbers."""

import ast
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch._inductor import config
from torch.nn.functional import scaled_dot_product_attention

from monarch_compile import explain
from monarch_compile.config import MonarchConfig
from monarch_compile.refusal import CODES
from tests.support.inductor import without_codegen

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks/NOTES.md"])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
MAX_WORDS = 1000
LINE = 120
ALWAYS = {"policy": "always"}

LINK = re.compile(r"\]\(\s*([^)\s]+)\s*\)")
FENCED = re.compile(r"```.*?```", re.DOTALL)
CODE = re.compile(r"\bcode (`\w+`)|\((`\w+`(?:, `\w+`)*)\)")
"""How docs/ name codes of refusals: after the word, or alone in brackets."""
PATH = re.compile(r"`((?:[\w.-]+/)+[\w.-]*)`")


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def results(name: str) -> dict:
    return json.loads(text_of(f"benchmarks/results/{name}"))


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def test_the_readme_is_short():
    assert len(text_of("README.md").split()) <= MAX_WORDS


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_relative_links_and_images_exist(page):
    for target in LINK.findall(FENCED.sub("", page.read_text(encoding="utf-8"))):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links {target}"
        assert not anchor or anchor in anchors(file), f"{page.name} links {target}"


def test_every_page_of_docs_is_linked_from_the_readme():
    assert {name for name in NAMES if name.startswith("docs/")} <= set(LINK.findall(text_of("README.md")))


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_lines_are_wrapped(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > LINE and not line.lstrip().startswith("|")] == []


def test_the_table_of_options_is_that_of_the_config():
    rows = [cells(line) for line in text_of("docs/options.md").splitlines() if line.startswith("| `")]
    stated = {name.strip("`"): ast.literal_eval(default.strip("`")) for name, default, _ in rows}
    assert stated == {field.name: field.default for field in fields(MonarchConfig)}


def test_codes_of_refusals_exist():
    text = "\n".join(text_of(name) for name in NAMES if name.startswith("docs/"))
    found = {name for groups in CODE.findall(text) for name in re.findall(r"\w+", " ".join(groups))}
    assert len(found) >= 20
    assert found - CODES.keys() == set()


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "benchmarks/NOTES.md"])
def test_paths_in_code_spans_exist(name):
    assert [path for path in PATH.findall(text_of(name)) if not (ROOT / path).exists() and "build/" not in path] == []


def test_the_headline_numbers_are_the_recorded_ones():
    names = {"vit-l": "ViT-L", "dit-xl": "DiT-XL"}
    graph_ms = {
        (
            names[row["problem"]["architecture"]["name"]],
            row["problem"]["batch"],
            row["problem"]["tokens"],
            row["form"],
        ): (row["times"]["graph"]["p50"])
        for row in results("models_h200.json")["rows"]
        if "graph" in row["times"]
    }
    table = [cells(line) for line in text_of("README.md").splitlines() if re.match(r"\| (ViT|DiT)", line)]
    assert len(table) == 4
    for title, *stated in table:
        name, batch, tokens = re.fullmatch(r"(\S+), (\d+) x (\d+)", title).groups()
        exact, monarch = (graph_ms[name, int(batch), int(tokens), f] for f in ("exact cudnn", "monarch window=1"))
        assert stated == [f"{exact:.2f}", f"{monarch:.2f}", f"{exact / monarch:.2f}"]


def test_the_table_of_attention_alone_is_the_recorded_one():
    lines = text_of("docs/numbers.md").splitlines()
    rows = results("speed_h200.json")["rows"]

    def recorded(problem, subject, form=None):
        (row,) = (r for r in rows if (r["problem"], r["subject"], r["form"]) == (problem, subject, form))
        return row["times"]["graph"]["p50"], row["block_size"]

    problems = list({json.dumps(row["problem"]): row["problem"] for row in rows}.values())
    for problem in problems:
        forms = [{"num_iters": 1, "window": window, "prefix": 0} for window in (None, 1)]
        (far, far_block), (near, near_block) = (recorded(problem, "monarch", form) for form in forms)
        exact = [recorded(problem, subject)[0] for subject in ("cudnn", "flash", "flex")]
        heads = "" if problem["head_dim"] == 64 else ", 16 heads of 128"
        title = f"{problem['batch']}, {problem['seq_len']}{heads}"
        times = " | ".join(f"{ms:.4f}" for ms in (near, *exact))
        assert f"| {title} | {far_block} | {far:.4f} | {near_block} | {times} | {exact[0] / near:.2f} |" in lines


def test_the_table_of_quality_is_the_recorded_one():
    rows = {(row["task"], row["title"]): row for row in results("quality_cpu.json")["rows"]}
    titles = {
        "exact": "exact",
        "paper's form": "paper's form (`window=None`)",
        "paper's form, two iterations": "paper's form, `num_iters=2`",
        "exact window of one block": "default window, `window=1`",
        "calibrated": "calibrated",
        "control: uniform attention": "control: uniform attention",
        "control: block-diagonal attention": "control: own block only",
    }
    metrics = {
        "whisper": ("kl", "wer_long", "wer_short"),
        "minilm": ("mrr",),
        "distillmos": ("rmse",),
        "lightglue": ("recall",),
    }
    lines = text_of("docs/quality.md").splitlines()
    for recorded, title in titles.items():
        stated = []
        for task, names in metrics.items():
            row = rows[task, recorded]
            sites = "" if recorded == "exact" else f" ({row['lowered']} of {row['sites']})"
            stated += [f"{row['metrics'][name]:.3f}{sites if name == names[0] else ''}" for name in names]
        assert f"| {title} | {' | '.join(stated)} |" in lines


def test_the_table_of_images_is_the_recorded_one():
    rows = {row["variant"]: row for row in results("quality_images_cpu.json")["rows"] if row["task"] == "dinov2_4097"}
    titles = {
        "rows": "pieces of rows, `grid=None, prefix=1, window=1`",
        "default": "defaults: tiles of 8 x 8 and the four beside them",
        "tiles_4x4_plus": '`tile=(4, 4), window=1, window_shape="plus"`',
        "tiles_4x8_own": "`tile=(4, 8), window=0`",
        "uniform": "control: uniform attention",
    }
    lines = text_of("docs/quality.md").splitlines()
    for variant, title in titles.items():
        stated = [f"{rows[variant]['metrics'][name]:.3f}" for name in ("patch_error", "cosine", "class_error")]
        assert f"| {title} | {' | '.join(stated)} |" in lines


def test_the_snippets_of_the_readme_run(monkeypatch, tmp_path):
    without_codegen(monkeypatch)
    monkeypatch.chdir(tmp_path)
    names = {"model": scaled_dot_product_attention, "inputs": tuple(torch.randn(3, 1, 1, 512, 16))}
    snippets = re.findall(r"```python\n(.*?)```", text_of("README.md"), re.DOTALL)
    assert len(snippets) == 5
    with config.patch(force_disable_caches=True):
        for snippet in snippets:
            exec(snippet, names)
    assert [site.status for site in names["report"].sites] == ["lowered"]
    found = explain(names["convolve"], torch.randn(2, 64, 512).bfloat16(), torch.randn(64, 512), options=ALWAYS)
    assert found.summary == "1 of 1 long convolutions lowered in 1 graph"
    assert (tmp_path / "report.html").exists()
    assert (tmp_path / "plan.json").exists()
