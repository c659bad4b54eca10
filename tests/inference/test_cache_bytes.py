"""The memory of a key-value cache, computed before it is filled."""

import pytest
import torch
from tiny_models import FAMILIES, family
from transformers import Cache

from rbfast.inference.cache import cache_bytes


def tensor_bytes(value):
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(tensor_bytes, value.values())) if isinstance(value, dict) else 0


@pytest.mark.parametrize("name", FAMILIES)
def test_cache_bytes_match_a_filled_cache(name):
    model = family(name)
    with torch.no_grad():
        output = model(torch.ones(3, 40, dtype=torch.long), use_cache=True)
    [cache] = [value for value in output.values() if isinstance(value, Cache)]
    expected = sum(tensor_bytes(vars(layer)) for layer in cache.layers)
    assert cache_bytes(model, 3, 40) == pytest.approx(expected, rel=0.01)  # layers with a window hold a counter too
