"""Forward, backward and optimizer's step of two layers of a mixture of experts: frozen, adapted, with PEFT's LoRA."""

from registry import Case, Contest, Place

from cases.models import mixture
from cases.step import contest


def make(place: Place) -> Contest:
    T = place.size(4096 if place.device == "cuda" else 1024, 32)
    experts = mixture(place).config.num_experts
    return contest(place, f"step of a mixture of {experts} experts, T={T}", lambda: mixture(place), T, 1)


CASES = [Case("mixture", "a step", make)]
