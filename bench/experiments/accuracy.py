"""Accuracy in bf16, for rbfast and its peers: gradients, negative divergences, merging and unmerging.

    python bench/experiments accuracy            # rewrites its section of docs/bench.md; about three minutes

Student and teacher have logits that are exactly a given gap apart, in bf16: the teacher's hidden states are the
student's with a few more features, and so is its head. The gradient of the hidden states is compared with that of
DistillLoss on the same inputs in fp64, which runs the plain reference.
"""

import argparse
from collections.abc import Mapping
from dataclasses import fields, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from harness import reason, versions
from peers.adapters import ADAPTERS, sparse, trained
from peers.losses import DENSE, PACKAGES, TOP_K, Batch, Loss, Peer, liger, rbfast_dense, rbfast_top_k, trl_gkd
from publish import PAGE, cpu, put_section
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

T, H, V, K, EXTRA = 64, 256, 4096, 20, 8
GAPS = (1.0, 0.1, 0.02, 0.001)
# In addition to the timed peers: two of them without mixed precision or without a compiler.
ALSO = {
    "TRL GKD on bf16 logits": Peer(partial(trl_gkd, upcast=False)),
    "Liger JSD, not compiled": Peer(partial(liger, compile=False)),
}
DIVERGENCES = {who: peer for who, peer in (DENSE | ALSO).items() if peer.is_divergence}
TABLES = {
    "Forward KL, full teacher": (0.0, DENSE | ALSO, rbfast_dense),
    "Jensen-Shannon, beta 0.5, full teacher": (0.5, DIVERGENCES, rbfast_dense),
    f"Forward KL, top-k, k={K}": (0.0, TOP_K, rbfast_top_k),
}


def percent(share: float) -> str:
    return f"{100 * share:.0f}%" if share >= 0.1 else f"{100 * share:.2g}%"


# ---- losses ----


def batch_at(gap: float, tokens: int = T) -> Batch:
    """bf16 inputs whose logits differ by `gap` (rms) between student and teacher."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    hidden, weight = draw(tokens, H).bfloat16(), (draw(V, H) * (3 / H**0.5)).bfloat16()
    apart, direction = (draw(tokens, EXTRA) * (gap / EXTRA**0.5)).bfloat16(), draw(V, EXTRA).bfloat16()
    labels = torch.randint(V, (tokens,), generator=g)
    return Batch.near(hidden, weight, labels, torch.cat([hidden, apart], 1), torch.cat([weight, direction], 1), K)


def in_fp64(batch: Batch) -> Batch:
    tensors = {field.name: getattr(batch, field.name).detach() for field in fields(batch)}
    wide = Batch(**{name: x.double() if x.is_floating_point() else x for name, x in tensors.items()})
    wide.hidden.requires_grad_()
    return wide


def gradient(loss: Loss, batch: Batch) -> Tensor:
    """The gradient of the hidden states, in fp64."""
    batch.hidden.grad = None
    loss(batch).backward()
    assert batch.hidden.grad is not None
    return batch.hidden.grad.double()


def negatives(loss: Loss, batch: Batch) -> int:
    """The number of rows with a negative divergence, each in its own call."""
    by_row = {name: getattr(batch, name).detach() for name in ("hidden", "labels", "teacher_hidden", "ids", "logprobs")}
    count = 0
    for row in range(len(batch.hidden)):
        one = replace(batch, **{name: x[row : row + 1] for name, x in by_row.items()})
        one.hidden.requires_grad_()
        count += loss(one).item() < 0
    return count


def cells(peer: Peer, beta: float, batches: Mapping[float, Batch], exact: Mapping[float, Tensor]) -> list[str]:
    """A peer's row of a table: error and negative rows at every gap, or why there are none."""
    try:
        loss = peer.load(beta)
        found = []
        for gap, batch in batches.items():
            error = float((gradient(loss, batch) - exact[gap]).norm() / exact[gap].norm())
            count = f"{negatives(loss, batch)}" if peer.is_divergence else "-"
            found.append(f"{percent(error)} ({count})")
        return found
    except Exception as error:  # a peer's failure is a finding
        return [reason(error)] + [""] * (len(batches) - 1)


def loss_table(title: str) -> str:
    beta, peers, ours = TABLES[title]
    batches = {gap: batch_at(gap) for gap in GAPS}
    exact = {gap: gradient(ours(beta), in_fp64(batch)) for gap, batch in batches.items()}
    lines = [f"| {title} | " + " | ".join(f"gap {gap:g}" for gap in GAPS) + " |", "| --- " * (1 + len(GAPS)) + "|"]
    for who, peer in peers.items():
        lines.append(f"| {who} | " + " | ".join(cells(peer, beta, batches, exact)) + " |")
    return "\n".join(lines)


# ---- adapters ----


class Merge(NamedTuple):
    """change: of the weights by merging. difference: of the merged model's output from the attached one's. Both are
    relative. changed, lost: numbers of weights that merging changes, and that unmerging does not restore."""

    values: int
    change: float
    difference: float
    changed: int
    lost: int
    weights: int


def small_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=H,
        intermediate_size=3 * H,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    return LlamaForCausalLM(config).bfloat16().eval()


def merge_and_back(who: str, steps: int = 10) -> Merge:
    """Trains an adapter of a small bf16 model for a few steps, merges it, and unmerges it."""
    model = small_model()
    linears = [module for module in model.model.modules() if isinstance(module, nn.Linear)]
    ids = torch.randint(512, (1, T), generator=torch.Generator().manual_seed(1))

    def weights() -> Tensor:
        return torch.cat([linear.weight.detach().flatten() for linear in linears])

    base = weights()
    # At the default density, the adapter of this small model would train fewer values than the peers.
    adapter = sparse(model, density=0.005) if who == "rbfast" else ADAPTERS[who](model)
    parameters = trained(adapter)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def output() -> Tensor:
        with torch.no_grad():
            return model(input_ids=ids).logits.double()

    attached = output()
    (adapter.merge if who == "rbfast" else adapter.merge_adapter)()
    merged, there = output(), weights()
    (adapter.unmerge if who == "rbfast" else adapter.unmerge_adapter)()
    return Merge(
        values=sum(parameter.numel() for parameter in parameters),
        change=float((there.double() - base.double()).norm() / base.double().norm()),
        difference=float((merged - attached).norm() / attached.norm()),
        changed=int((there != base).sum()),
        lost=int((weights() != base).sum()),
        weights=len(base),
    )


def merge_table() -> str:
    heads = ("adapter", "trained values", "change of the weights", "weights it changes", "merged against attached")
    lines = ["| " + " | ".join((*heads, "not restored")) + " |", "| --- " * 6 + "|"]
    for who in ADAPTERS:
        try:
            m = merge_and_back(who)
        except ImportError as error:
            lines.append(f"| {who} | {reason(error)} |" + " |" * 4)
            continue
        changed, lost = (f"{n:,} ({percent(n / m.weights)})" if n else "0" for n in (m.changed, m.lost))
        lines.append(f"| {who} | {m.values:,} | {percent(m.change)} | {changed} | {percent(m.difference)} | {lost} |")
    return "\n".join(lines)


# ---- the section ----


def section() -> str:
    found = versions(("torch", "transformers", "peft", *PACKAGES))
    tables = "\n\n".join(loss_table(title) for title in TABLES)
    return f"""`python bench/experiments accuracy`

Relative error of the loss's gradient in the hidden states against fp64 on the same bf16 inputs, and in brackets how
many of {T} rows have a negative divergence (-: its value is not a divergence). T={T}, H={H}, V={V}; the gap is the rms
distance of the logits. Rounding logits to bf16 moves them by about 0.2%, more than a small gap.

{tables}

A two-layer model in bf16 (H={H}) with an adapter on every linear is trained for 10 steps of AdamW at 1e-3, merged and
unmerged. The table shows how far the merged model's logits are from those with the adapter attached, and how many
weights differ from the original ones in the end.

{merge_table()}

{date.today()}; {cpu()}; {", ".join(f"{name} {version}" for name, version in found.items())}.
"""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=PAGE, help="Markdown file to put the section in")
    args = parser.parse_args(argv)
    text = section()
    put_section(args.page, "accuracy", text)
    print(text)
    return 0
