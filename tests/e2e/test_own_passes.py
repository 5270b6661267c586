"""A user's own pass at the place of our cache key is run beside it, and its hash is part of the key."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

from monarch_compile.backend import CacheKey
from monarch_compile.config import MonarchConfig
from tests.support.inductor import without_codegen

PLACE = "joint_custom_pre_pass"


class Sines(CustomGraphPass):  # type: ignore[misc]
    """Turns cosines into sines: seen in the result."""

    def __init__(self, hash_: object = "sines") -> None:
        self.hash = hash_

    def __call__(self, graph: Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.cos.default):
            node.target = torch.ops.aten.sin.default

    def uuid(self) -> Any:
        return self.hash


@pytest.fixture(autouse=True)
def _without_codegen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    without_codegen(monkeypatch)
    torch._dynamo.reset()
    with config.patch(force_disable_caches=True):
        yield


def attend(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x).cos()


@torch.no_grad()
@pytest.mark.parametrize("policy", ["always", "never"])
@pytest.mark.parametrize("place", ["config", "options"])
@pytest.mark.parametrize("form", ["pass", "function", "list"])
def test_it_runs(form: str, place: str, policy: str) -> None:
    own: Any = {"pass": Sines(), "function": Sines().__call__, "list": [Sines()]}[form]
    if form == "list" and not hasattr(torch._inductor.custom_graph_pass, "get_custom_graph_passes"):
        pytest.skip("this torch takes one pass")
    options: dict[str, Any] = {"policy": policy, "block_size": 16}
    x = torch.randn(1, 2, 16, 4)
    with config.patch({PLACE: own} if place == "config" else {}):
        given = options if place == "config" else options | {PLACE: own}
        output = torch.compile(attend, backend="monarch", options=given)(x)
        assert config.joint_custom_pre_pass is (own if place == "config" else None)
    torch.testing.assert_close(output, F.scaled_dot_product_attention(x, x, x).sin())


def test_its_hash_is_in_the_key() -> None:
    settings = MonarchConfig()
    passes: list[list[Any]] = [[], [Sines("a")], [Sines("b")], [Sines(b"b")], [Sines("a"), Sines("b")]]
    keys = [CacheKey(settings, theirs=theirs).uuid() for theirs in passes]
    assert None not in keys
    assert len(set(keys)) == len(passes)
    assert CacheKey(settings, theirs=[Sines("a")]).uuid() == keys[1]


@pytest.mark.parametrize("own", [lambda graph: None, Sines(None)])
def test_without_a_hash_nothing_is_cached(own: Any) -> None:
    assert CacheKey(MonarchConfig(), theirs=[Sines("a"), own]).uuid() is None
