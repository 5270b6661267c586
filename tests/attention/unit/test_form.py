"""The form of a Monarch attention: its options are listed in one place, and every door refuses the same values."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from monarch_compile.attention.form import FORM_OPTIONS, FORM_RULES, Form
from monarch_compile.attention.functional import monarch_attention
from monarch_compile.attention.gradients import OPTIONS
from monarch_compile.attention.op import ATTENTION_BACKWARD_OP, ATTENTION_OP, ATTENTION_WITH_LSE_OP
from monarch_compile.config import MonarchConfig
from monarch_compile.errors import ConfigError, InputError, IRError

ROOT = Path(__file__).resolve().parents[3]
FOLDERS = ("monarch_compile", "passes", "codegen")
SIGNATURES = {
    ("form.py", "Form"): "the definition",
    ("form.py", "FORM_RULES"): "the rules",
    ("config.py", "MonarchConfig"): "options of torch.compile, with their defaults",
    ("functional.py", "monarch_attention"): "the public function",
    ("gradients.py", "named"): "the operators' schemas",
    ("reference.py", "_attend"): "the meaning",
    ("candidates.py", "SEARCH"): "values that calibrate tries",
    ("ir.py", "__str__"): "prints them",
}
"""Where the options are spelled out: a signature, or values for each."""


def _words(node: ast.AST) -> Iterator[str]:
    for found in ast.walk(node):
        if isinstance(found, ast.Constant) and isinstance(found.value, str):
            yield found.value
        elif isinstance(found, (ast.arg, ast.keyword)) and found.arg:
            yield found.arg
        elif isinstance(found, ast.AnnAssign) and isinstance(found.target, ast.Name):
            yield found.target.id
        elif isinstance(found, ast.Attribute):
            yield found.attr


def _name(node: ast.stmt) -> str:
    if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
        return node.name
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return ", ".join(target.id for target in targets if isinstance(target, ast.Name))


def _statements(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements of a module; of a class, each of its methods and the rest as a whole."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            methods = [x for x in node.body if isinstance(x, ast.FunctionDef)]
            yield from methods
            fields = [x for x in node.body if x not in methods]
            yield ast.ClassDef(node.name, node.bases, node.keywords, fields, node.decorator_list)
        else:
            yield node


def test_the_options_are_spelled_out_in_one_place() -> None:
    found = set()
    for path in (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        for node in _statements(ast.parse(path.read_text(encoding="utf-8"))):
            if len(set(FORM_OPTIONS) & set(_words(node))) > len(FORM_OPTIONS) - 2:
                found.add((path.name, _name(node)))
    assert found == set(SIGNATURES)


def test_the_operator_and_the_config_have_the_options_of_the_form() -> None:
    plain, with_lse, backward = (
        [(argument.name, str(argument.type)) for argument in op._schema.arguments]
        for op in (ATTENTION_OP, ATTENTION_WITH_LSE_OP, ATTENTION_BACKWARD_OP)
    )
    assert tuple(name for name, _ in plain)[4:] == OPTIONS == ("scale", *FORM_OPTIONS, "grid", "causal")
    assert with_lse == plain
    assert backward[:1] + backward[5:7] == [(name, "Tensor") for name in ("grad", "output", "lse")]
    assert backward[1:5] + backward[7:] == plain
    config = MonarchConfig(
        block_size=15,
        num_iters=2,
        init="mean",
        window=3,
        prefix=4,
        tile=(3, 5),
        window_shape="plus",
        prefix_at_end=True,
    )
    assert config.form() == Form(15, 2, "mean", "post", 3, 4, (3, 5), "plus", True)
    auto = {"block_size": 5, "window": 1, "prefix": 0, "tile": None, "window_shape": "box", "prefix_at_end": False}
    assert MonarchConfig(pad="pre").form(**auto) == Form(5, 1, "identity", "pre", 1, 0)
    assert tuple(FORM_RULES) == FORM_OPTIONS


BAD = {
    "block_size": 0,
    "num_iters": True,
    "init": "zeros",
    "pad": "both",
    "window": -1,
    "prefix": 1.5,
    "tile": (4, 0),
    "window_shape": "star",
    "prefix_at_end": 1,
    "chosen": -1,
}


@pytest.mark.parametrize("name", FORM_OPTIONS)
def test_every_door_refuses_the_same_values_in_the_same_words(name: str) -> None:
    wrong, q = {"block_size": 4, name: BAD[name]}, torch.zeros(1, 1, 4, 2)
    message = f"'{name}' must be .*; found {re.escape(repr(BAD[name]))}"
    with pytest.raises(IRError, match=message):
        Form(**wrong)
    with pytest.raises(ConfigError, match=message):
        MonarchConfig(**wrong)
    with pytest.raises(InputError, match=message):
        monarch_attention(q, q, q, **wrong)


def test_without_a_prefix_it_lies_nowhere() -> None:
    assert Form(4, prefix_at_end=True) == Form(4)
    assert Form(4, prefix=2, prefix_at_end=True).across() == Form(4).across()
    assert str(Form(4, prefix=2, prefix_at_end=True)) == str(Form(4, prefix=2))[:-1] + ", prefix_at_end=True)"


@pytest.mark.parametrize(
    ("form", "exact"),
    [
        (Form(4), False),
        (Form(4, window=0), True),
        (Form(4, prefix=1), True),
        (Form(4, chosen=1), True),
        (Form(4, window=1).across(), False),
    ],
)
def test_which_forms_have_exact_keys(form: Form, exact: bool) -> None:
    assert form.has_exact_keys is exact
