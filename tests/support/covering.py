"""Cases that cover a grid of parameters without running every combination."""

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any

import pytest


def covering(strength: int, **values: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrizes a test so that any `strength` of its parameters take every combination of their values.

    A fault depends on few parameters. The full grid would have several times as many cases.
    """
    grid = list(product(*values.values()))
    places = list(product(*(range(len(column)) for column in values.values())))
    met = [set(combinations(enumerate(place), strength)) for place in places]
    missing = set().union(*met)
    chosen = []
    while missing:
        best = max(range(len(grid)), key=lambda case: len(met[case] & missing))
        chosen.append(best)
        missing -= met[best]
    return pytest.mark.parametrize(tuple(values), [grid[case] for case in sorted(chosen)])
