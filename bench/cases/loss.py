"""DistillLoss forward and backward beside its peers; the floor is its own GEMMs.

Top-k is k = 20 with the exact tail, dense is a teacher with its own head. The floor is torch.mm of the shapes that the
loss cannot avoid, into preallocated memory: logits and dX, the teacher's logits, a trained head's dW. All in bf16, or
in fp32 on a CPU that cannot multiply bf16.
"""

from collections.abc import Callable
from functools import partial

import torch
from harness import Step
from peers.losses import SIGNALS, SIGNALS_ON_GPU, TOP_K, Batch, Peer, rbfast_top_k
from registry import Bar, Case, Contest, Place

K = 20
STUDENTS = {  # T, H, V and rounds; the widest head gets fewer tokens, to keep the run short
    "SmolLM2-135M": (1024, 576, 49152, 5),
    "Qwen2.5-0.5B": (1024, 896, 151936, 3),
    "Qwen2.5-1.5B": (256, 1536, 151936, 3),
}
LLAMA_8B, SMALL = (4096, 4096, 128256, 9), (256, 576, 49152, 30)
GPT2 = (4096, 768, 50257, 9)  # a vocabulary that is not a multiple of 2
TOY = (32, 64, 512, 2)


def floor(signal: str, batch: Batch) -> Step:
    """The GEMMs alone."""
    hidden, weight = batch.hidden.detach(), batch.weight.detach()
    logits = hidden.new_empty(len(hidden), len(weight))
    dz = torch.randn_like(logits)
    gemms: list[Callable[[], object]] = [
        lambda: torch.mm(hidden, weight.T, out=logits),
        lambda: torch.mm(dz, weight),
    ]
    if signal == "dense":
        gemms.append(lambda: torch.mm(batch.teacher_hidden, batch.teacher_weight.T, out=logits))
    if batch.weight.requires_grad:
        gemms.append(lambda: torch.mm(dz.T, hidden))

    def step() -> None:
        for gemm in gemms:
            gemm()

    return step


def forward_and_backward(peer: Peer, batch: Batch) -> Step:
    """The step raises ImportError if the peer's package is missing."""
    loss = None

    def step() -> None:
        nonlocal loss
        loss = loss or peer.load(0.0)
        batch.hidden.grad = batch.weight.grad = None
        loss(batch).backward()

    return step


def make(
    place: Place,
    shape: tuple[int, int, int, int],
    signal: str,
    peers: dict[str, Peer],
    bars: tuple[Bar, ...] = (),
    is_trained: bool = False,
    is_host_bound: bool = False,
) -> Contest:
    T, H, V, rounds = TOY if place.is_toy else shape
    batch = Batch.draw(T, H, V, K, place.dtype, place.device, is_trained)
    head = "trained" if is_trained else "frozen"
    gemms = 2 + (signal == "dense") + is_trained
    return Contest(
        f"loss, {signal}, {head} head, T={T} H={H} V={V} {place.dtype}",
        {"floor": floor(signal, batch)} | {who: forward_and_backward(peer, batch) for who, peer in peers.items()},
        bars,
        rounds,
        is_host_bound,
        {who: peer.note for who, peer in peers.items()},
        {"flops": 2 * T * H * V * gemms},
    )


def at_student(name: str, signal: str) -> Case:
    bars = (Bar("rbfast / floor", "<=", 1.25), Bar("torch.compile / rbfast", ">=", 1.0))
    made = partial(make, shape=STUDENTS[name], signal=signal, peers=SIGNALS[signal], bars=bars)
    return Case("loss", f"{signal}, {name}", made, ("cpu",))


def at_8b(signal: str, is_trained: bool, *bars: Bar) -> Case:
    made = partial(make, shape=LLAMA_8B, signal=signal, peers=SIGNALS_ON_GPU[signal], bars=bars, is_trained=is_trained)
    return Case("loss", f"{signal}, {'trained' if is_trained else 'frozen'} head", made, ("cuda",))


_SMALL_PEERS = {
    "rbfast": TOP_K["rbfast"],
    "rbfast, rows unknown": Peer(partial(rbfast_top_k, knows_rows=False)),
    "torch": TOP_K["torch"],
}
_SMALL_BARS = (
    Bar("rbfast ms", "<=", 0.5),
    Bar("rbfast waits", "<=", 0),
    Bar("rbfast, rows unknown ms", "<=", 0.5),
    Bar("rbfast, rows unknown waits", "<=", 2),
)
_ODD_PEERS = {who: TOP_K[who] for who in ("rbfast", "torch.compile")}
_LEAN = Bar("rbfast GB", "<=", 1.0)
_FASTER = Bar("torch.compile / rbfast", ">=", 1.0)
CASES = [
    *(at_student(name, signal) for name in STUDENTS for signal in SIGNALS),
    Case(
        "loss",
        "a small call",
        partial(
            make,
            shape=SMALL,
            signal="top-k",
            peers=_SMALL_PEERS,
            bars=_SMALL_BARS,
            is_host_bound=True,
        ),
        ("cuda",),
    ),
    at_8b("top-k", False, Bar("rbfast ms", "<=", 12.0), Bar("torch.compile / rbfast", ">=", 1.3), _LEAN),
    at_8b("top-k", True, Bar("rbfast ms", "<=", 18.5), _FASTER, _LEAN),
    at_8b("dense", False, Bar("rbfast ms", "<=", 18.5), _FASTER, _LEAN),
    Case(
        "loss",
        "top-k, an odd vocabulary",
        partial(make, shape=GPT2, signal="top-k", peers=_ODD_PEERS, bars=(_FASTER, _LEAN)),
        ("cuda",),
    ),
]
