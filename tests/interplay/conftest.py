"""What tests of compiled code share: a fresh compiler, and PyTorch's warnings to itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

OF_PYTORCH_ITSELF = [
    "ignore:The .grad attribute of a Tensor:UserWarning",
    "ignore:<class 'torch.autograd.function.Function'> should not be:DeprecationWarning",
    "ignore:`torch.jit:DeprecationWarning",
    "ignore:`torch._prims_common.check` is deprecated:FutureWarning",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            for warning in OF_PYTORCH_ITSELF:
                item.add_marker(pytest.mark.filterwarnings(warning))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled before, nothing left behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
