"""Small models around a layer of any kind, adapters for them, and a check of every gradient."""

import pytest
import torch
from tiny_models import attach, disturb
from torch import nn


class Pair(nn.Module):
    """A plain linear layer, and then the layer under test."""

    def __init__(self, layer, width=16):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.layer = nn.Linear(width, width), layer

    def forward(self, x):
        return self.layer(self.first(x).tanh())


def rows(width=16):
    return torch.randn(5, width, generator=torch.Generator().manual_seed(3))


def attach_full(model, **options):
    return attach(model, **{"density": 1.0, "rank": 1, "support": 16} | options)


def layer(**options):
    torch.manual_seed(1)
    return nn.Linear(16, 8, **options)


def check_gradients(model, adapter, x):
    """Checks the adapter's gradients against finite differences of the loss."""

    def loss():
        y = model(x).double()
        return (y - torch.linspace(-1, 1, y.numel()).view_as(y)).square().sum()

    disturb(adapter)
    loss().backward()
    for name, parameter in adapter.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        direction = parameter.grad / parameter.grad.norm()
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * 1e-2)
                adapter.fold()
                values.append(loss().item())
                parameter.sub_(direction, alpha=sign * 1e-2)
        adapter.fold()
        assert (values[0] - values[1]) / 2e-2 == pytest.approx(parameter.grad.norm().item(), rel=5e-2), name
