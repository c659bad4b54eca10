"""Problems for pools of any size: made by a seeded generator, MATH-like in length."""

import random
import re

EVALUATIONS = 500  # benchmark problems that a pool is checked against
WORDS = re.findall(
    r"\w+",
    "find the number of integers such that sum all positive real values area triangle circle radius point let be a "
    "function polynomial with roots in set each how many ways probability that two distinct prime divisor remainder "
    "when divided by largest smallest possible value given line plane angle sequence term first what is of and if then",
)


def problem(rng: random.Random) -> str:
    """A text of about 50 tokens with some LaTeX, 230 characters on average."""
    words = rng.choices(WORDS, k=rng.randrange(20, 45))
    maths = f"$\\frac{{{rng.randrange(100)}}}{{x+{rng.randrange(1000)}}} \\leq {rng.randrange(10**6)}y^{{2}}$"
    words.insert(rng.randrange(len(words)), maths)
    return " ".join(words).capitalize() + "?"
