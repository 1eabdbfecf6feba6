"""Where in a training checkpoint the weights are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dfq.errors import WeightsError
from dfq.vit.weights import read_weights

State = dict[str, Tensor]
STATE: State = {"norm.weight": torch.arange(3.0), "norm.bias": torch.arange(3.0) + 1}
OTHER: State = {name: value + 10 for name, value in STATE.items()}


def cyclic(state: State) -> dict[str, Any]:
    content: dict[str, Any] = {"model": state}
    content["state_dict"] = content
    return content


NESTED: dict[str, Callable[[State], dict[str, Any]]] = {
    "plain": lambda state: dict(state),
    "an average first": lambda state: {"state_dict": OTHER, "model_ema": state},
    "an empty average": lambda state: {"model_ema": {}, "state_dict": state},
    "an average without tensors": lambda state: {
        "state_dict_ema": {"decay": 0.99},
        "state_dict": state,
    },
    "an empty average inside": lambda state: {"model": {"model_ema": {"state_dict": {}}, **state}},
    "settings named as a model": lambda state: {"model": {"depth": 12}, **state},
    "parts of a model": lambda state: {"state_dict": {}, "norm": {"weight": state["norm.weight"]}},
    "a cycle": cyclic,
}


@pytest.mark.parametrize("where", NESTED)
def test_the_first_dict_with_tensors_is_read(where: str, tmp_path: Path) -> None:
    torch.save(NESTED[where](STATE), tmp_path / "w.pth")
    found = read_weights(tmp_path / "w.pth")
    expected = {"norm.weight": STATE["norm.weight"]} if where == "parts of a model" else STATE
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_cycle_without_tensors_holds_no_weights(tmp_path: Path) -> None:
    content: dict[str, Any] = {}
    content["state_dict"] = content
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"holds no model weights .*'state_dict'"):
        read_weights(tmp_path / "w.pth")
