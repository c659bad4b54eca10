"""What a gradient filter saves, and what it costs: the demo's student on worked traces of the demo's families.

    python bench/experiments gradient_filter

Filtering depends on how peaked a model's distributions are, so the hidden states and the head are a real student's, and
the traces are real text. The loss runs forward and backward at several `gradient_filter`s, in turn with the products
that it cannot avoid (torch.mm of the same shapes); the gradient is compared with the unfiltered one, row by row. The
table is written between the markers of docs/results.md.
"""

import argparse
import shlex
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from pathlib import Path

import torch
from publish import RESULTS, cpu, publish
from torch import Tensor

from rbfast.data.encoding import IGNORE, collate, encode_all
from rbfast.demo.run import FAMILIES
from rbfast.demo.worked_families import split
from rbfast.loss.distill_loss import DistillLoss, LossOutput
from rbfast.loss.teacher_signal import TopK
from rbfast.models.student import SMOLLM2, fast_dtype, final_hidden, load_student

SHARES = (0.0, 0.005, 0.01, 0.02, 0.05)
K = 20


def states(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden [T, H], labels [T], head [V, H]) of the first T = `tokens` supervised tokens of worked traces."""
    model, tokenizer = load_student(SMOLLM2, fast_dtype())
    traces = [trace for name in FAMILIES for trace in split(name, train=8, held_out=1, seed=0)[0]]
    batch = collate(encode_all(traces, tokenizer, max_tokens=512)[0])
    with torch.no_grad():
        hidden = final_hidden(model, batch["input_ids"], batch["position_ids"], batch["lengths"])
    rows = (batch["labels"].view(-1) != IGNORE).nonzero()[:tokens, 0]
    if len(rows) < tokens:
        raise ValueError(f"the traces have {len(rows)} supervised tokens, fewer than {tokens}: lower --tokens")
    return hidden[rows].clone(), batch["labels"].view(-1)[rows], model.get_output_embeddings().weight.detach()


def teacher(hidden: Tensor, head: Tensor) -> TopK:
    """A teacher near the student: its hidden states with a tenth of noise, through the same head."""
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
    moved = hidden.float() + 0.1 * hidden.float().std() * noise
    rows = [torch.log_softmax(part @ head.float().T, 1).topk(K, 1) for part in moved.split(128)]
    return TopK(torch.cat([row.indices for row in rows]), torch.cat([row.values for row in rows]))


def measure(tokens: int, rounds: int) -> list[str]:
    hidden, labels, head = states(tokens)
    hidden.requires_grad_()
    dz, logits = (torch.randn(len(hidden), len(head)).to(head.dtype) for _ in range(2))

    def products() -> None:
        torch.mm(hidden.detach(), head.T, out=logits)
        torch.mm(dz, head)

    def step(loss_fn: DistillLoss, signal: TopK | None) -> LossOutput:
        hidden.grad = None
        out = loss_fn(hidden, head, labels, signal, ce_weight=float(signal is None))
        out.loss.backward()
        return out

    steps: dict[tuple[str, float], Callable[[], LossOutput | None]] = {("products", 0.0): products}
    for name, signal in {"text": None, f"top-{K}": teacher(hidden.detach(), head)}.items():
        for share in SHARES:
            steps[name, share] = partial(step, DistillLoss(reduction="sum", gradient_filter=share), signal)
    seconds: dict[tuple[str, float], list[float]] = {key: [] for key in steps}
    for key in [*steps] + [*steps] * rounds:  # the first round warms up
        start = time.perf_counter()
        steps[key]()
        seconds[key].append(time.perf_counter() - start)
    floor = seconds.pop(("products", 0.0))[1:]
    lines = []
    for (name, share), times in seconds.items():
        ratios = [a / b for a, b in zip(times[1:], floor, strict=True)]
        out = steps[name, share]()
        assert out is not None and hidden.grad is not None
        if share == 0:
            exact = hidden.grad.double()
        size = exact.norm(dim=1)
        error = (hidden.grad.double() - exact).norm(dim=1) / size
        bound = torch.zeros_like(size) if out.hidden_grad_error_bound is None else out.hidden_grad_error_bound / size
        lines.append(
            f"| {name} | {share:g} | {statistics.median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f}) "
            f"| {error.median():.2%} | {error.max():.2%} | {bound.median():.2%} |"
        )
    return lines


def section(tokens: int, rounds: int, command: str) -> str:
    lines = measure(tokens, rounds)
    return "\n".join(
        [
            "## What a gradient filter saves and costs",
            "",
            f"`{command}`",
            "",
            f"The loss on {tokens} tokens of worked traces, forward and backward, relative to its two products in",
            f"torch ({rounds} rounds: median, fastest .. slowest). The error is the filter's relative change of a",
            "token's gradient in `hidden`; the bound is `LossOutput.hidden_grad_error_bound`.",
            "",
            "| signal | gradient_filter | seconds / products | error, median | error, largest | bound, median |",
            "| --- | --- | --- | --- | --- | --- |",
            *lines,
            "",
            f"SmolLM2-135M's states and head, {str(fast_dtype()).removeprefix('torch.')}; {date.today()}; {cpu()}, "
            f"{torch.get_num_threads()} threads; torch {torch.__version__}.",
        ]
    )


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024, help="rows of the loss (default: 1024)")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds (default: 9)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="Markdown file to put the section in")
    args = parser.parse_args(argv)
    command = shlex.join(["python", "bench/experiments", "gradient_filter", *argv])
    return publish("gradient_filter", args.results, "filter", lambda: section(args.tokens, args.rounds, command))
