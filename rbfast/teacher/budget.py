"""The budget for a teacher: prices, limits, and what was spent."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Prices:
    """The prices per million tokens read and written, in the currency of `max_cost`.

    Raises:
        ValueError: a price is negative or not finite.
    """

    read: float = 0.0
    written: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.read < math.inf and 0 <= self.written < math.inf):
            raise ValueError(f"prices must be finite and at least 0, got {self.read} and {self.written}")

    def cost(self, read: int, written: int) -> float:
        return (read * self.read + written * self.written) / 1e6


FREE = Prices()


@dataclass
class Budget:
    """Tokens spent so far, and the limits.

    Raises:
        ValueError: a limit is negative or not a number, or `max_cost` is set without prices.
    """

    prices: Prices
    max_cost: float | None
    max_tokens: int | None
    read: int = 0
    written: int = 0
    # The most tokens (read, written) by which a reply exceeded its worst case: the next may too. None: no reply yet.
    _over: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name, limit in (("max_cost", self.max_cost), ("max_total_tokens", self.max_tokens)):
            if limit is not None and not limit >= 0:
                raise ValueError(f"{name} must be at least 0, got {limit}")
        if self.max_cost is not None and self.prices == FREE:
            raise ValueError("max_cost needs prices per million tokens (--prices READ WRITTEN), got none")

    def pay(self, read: int, written: int) -> None:
        self.read, self.written = self.read + read, self.written + written

    def learn(self, worst: tuple[int, int], read: int, written: int) -> None:
        """Record by how much a reply exceeded its worst case."""
        over = self._over or (0, 0)
        self._over = max(over[0], read - worst[0]), max(over[1], written - worst[1])

    def max_concurrency(self, concurrency: int) -> int:
        """The allowed number of concurrent requests. With a budget it is 1 until the first reply, which shows whether
        the server honours `max_tokens`."""
        limited = self.max_cost is not None or self.max_tokens is not None
        return 1 if limited and self._over is None else concurrency

    @property
    def cost(self) -> float:
        return self.prices.cost(self.read, self.written)

    def can_afford(self, worst: Sequence[tuple[int, int]]) -> bool:
        """Whether the budget covers replies of these (read, written) tokens."""
        over = self._over or (0, 0)
        read = self.read + sum(r + over[0] for r, _ in worst)
        written = self.written + sum(w + over[1] for _, w in worst)
        if self.max_tokens is not None and read + written > self.max_tokens:
            return False
        return self.max_cost is None or self.prices.cost(read, written) <= self.max_cost

    def describe(self) -> str:
        cost = f", cost {self.cost:.2f}" if self.prices != FREE else ""
        return f"{self.read} tokens read, {self.written} written{cost}"
