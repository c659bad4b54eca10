"""What may be spent on a teacher, and what was."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Prices:
    """What a million tokens cost, read and written, in the currency of `max_cost`."""

    read: float = 0.0
    written: float = 0.0

    def cost(self, read: int, written: int) -> float:
        return (read * self.read + written * self.written) / 1e6


FREE = Prices()


@dataclass
class Purse:
    """What was spent, and the limits."""

    prices: Prices
    max_cost: float | None
    max_tokens: int | None
    read: int = 0
    written: int = 0
    # What a server took beyond what its request allowed, at most: the next may take as much. None: no reply yet.
    _over: tuple[int, int] | None = None

    def pay(self, read: int, written: int) -> None:
        self.read, self.written = self.read + read, self.written + written

    def learn(self, worst: tuple[int, int], read: int, written: int) -> None:
        """Notes how far a reply passed the worst that was expected of it."""
        over = self._over or (0, 0)
        self._over = max(over[0], read - worst[0]), max(over[1], written - worst[1])

    def at_a_time(self, concurrency: int) -> int:
        """Requests to have under way: under a limit one, until its reply says whether the server keeps to its own."""
        limited = self.max_cost is not None or self.max_tokens is not None
        return 1 if limited and self._over is None else concurrency

    @property
    def cost(self) -> float:
        return self.prices.cost(self.read, self.written)

    def affords(self, worst: Sequence[tuple[int, int]]) -> bool:
        """Whether the budget covers replies that read and write so many tokens at most."""
        over = self._over or (0, 0)
        read = self.read + sum(r + over[0] for r, _ in worst)
        written = self.written + sum(w + over[1] for _, w in worst)
        if self.max_tokens is not None and read + written > self.max_tokens:
            return False
        return self.max_cost is None or self.prices.cost(read, written) <= self.max_cost

    def words(self) -> str:
        cost = f", cost {self.cost:.2f}" if self.prices != FREE else ""
        return f"{self.read} tokens read, {self.written} written{cost}"
