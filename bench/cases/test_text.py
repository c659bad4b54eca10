"""The curation's loops at the size of a large pool, beside plain Python and the libraries people use for each.

    pytest bench/cases/test_text.py --benchmark-group-by=group --benchmark-columns=min,median,rounds -k "not million"
    pytest bench/cases/test_text.py -k million -s         # a million problems; prints seconds and peak memory
    taskset -c 0 pytest ... --benchmark-timer=time.process_time   # one core, on a machine that does other work too

Groups: `decontaminate` (5-shingles of a pool against 500 evaluation problems), `minhash` (64 values; datasketch),
`choose` (facility location; apricot's choice must be worth as much), `split_spans` (real thinking, if available).
The problems are those of cases/problems.py. The libraries run if they are installed: pip install datasketch
apricot-select cloudpickle.
"""

import random
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from real_thoughts import MODELS, thoughts

from cases.problems import EVALUATIONS, problem
from rbfast.curation import text, text_reference
from rbfast.curation.decontaminate import Decontaminator, Evaluation, join_shared
from rbfast.curation.selection import quotas, select_representatives, shortlist
from rbfast.data.spans import split_spans

POOL, MILLION = 4_000, 1_000_000


@pytest.fixture(scope="module")
def pool() -> list[str]:
    rng = random.Random(0)
    return [problem(rng) for _ in range(POOL)]


@pytest.fixture(scope="module")
def evaluations() -> list[Evaluation]:
    rng = random.Random(1)
    return [Evaluation(f"e:{i}", problem(rng)) for i in range(EVALUATIONS)]


def decontaminate(decontaminator: Decontaminator, problems: Sequence[str], threads: int, part: int = 50_000) -> int:
    """The number of contaminated problems. Reads the pool in parts, as the curation does."""
    found, fingerprints = [], []
    for start in range(0, len(problems), part):
        chunk = problems[start : start + part]
        texts = text.pack(chunk)
        found.append(decontaminator.find(texts, chunk, threads=threads))
        fingerprints.append(text.fingerprints(texts, threads=threads))
    matches = decontaminator.judge(join_shared(found), np.concatenate(fingerprints), threads=threads)
    return sum(match is not None for match in matches)


def measure(benchmark: BenchmarkFixture, group: str, call: Callable[[], object], rounds: int = 5) -> None:
    benchmark.group = group
    benchmark.extra_info.update(threads=text.cores(), native=text.implementation(), numpy=np.__version__)
    benchmark.pedantic(call, rounds=rounds, warmup_rounds=1)


@pytest.mark.parametrize("who", ("rbfast", "one thread", "oracle"))
def test_decontaminate(benchmark: BenchmarkFixture, monkeypatch, pool, evaluations, who: str) -> None:
    if who == "oracle":
        monkeypatch.setattr(text, "_IMPL", text_reference)
    decontaminator = Decontaminator(evaluations)
    threads = text.cores() if who == "rbfast" else 1
    measure(benchmark, f"decontaminate {POOL}", lambda: decontaminate(decontaminator, pool, threads), 3)


@pytest.mark.parametrize("who", ("rbfast", "one thread", "oracle", "datasketch"))
def test_minhash(benchmark: BenchmarkFixture, pool: list[str], who: str) -> None:
    rows, _ = text.shingles(text.pack(pool), 5)
    if who == "datasketch":
        datasketch = pytest.importorskip("datasketch")
        sets = [[value.tobytes() for value in part] for part in np.split(rows.values, rows.starts[1:-1])]
        calls = {who: lambda: datasketch.MinHash.bulk(sets, num_perm=64)}
    else:
        multipliers = text_reference.mix(np.arange(64, dtype=np.uint64)) | np.uint64(1)
        calls = {
            "rbfast": lambda: text.minhash(rows, 64, threads=text.cores()),
            "one thread": lambda: text.minhash(rows, 64),
            "oracle": lambda: text_reference.minhash(*rows, multipliers, 1),
        }
    measure(benchmark, f"minhash {POOL} x 64", calls[who], 3)


@pytest.mark.parametrize("who", ("rbfast", "one thread", "oracle", "apricot"))
def test_choose(benchmark: BenchmarkFixture, pool: list[str], who: str) -> None:
    n, size = 1_000, 100
    vectors, values = text.unit_vectors(text.pack(pool[:n]))
    if who == "apricot":
        apricot = pytest.importorskip("apricot")
        dense = np.zeros((n, vectors.values.max() + 1))
        dense[np.repeat(np.arange(n), vectors.lengths), vectors.values] = values / 2**15
        model = apricot.FacilityLocationSelection(size, metric="precomputed", optimizer="lazy")
        calls = {who: lambda: model.fit(dense @ dense.T)}
        ours, theirs = text.facility_location(vectors, values, size)[0], calls[who]().ranking
        reached = [(dense @ dense[chosen].T).max(1).sum() for chosen in (ours, theirs)]
        assert reached[0] == pytest.approx(reached[1], rel=1e-9)
    else:
        width = int(vectors.values.max()) + 1
        calls = {
            "rbfast": lambda: text.facility_location(vectors, values, size, threads=text.cores()),
            "one thread": lambda: text.facility_location(vectors, values, size),
            "oracle": lambda: text_reference.facility_location(vectors.starts, vectors.values, values, width, size, 1),
        }
    measure(benchmark, f"choose {size} of {n}", calls[who], 3)


def test_split_spans(benchmark: BenchmarkFixture) -> None:
    """The bar: 5 MB/s. Real thinking of four models, as tests/data/test_span_labels.py reads it."""
    thinking = "\n".join(thought for name in MODELS for thought in thoughts(name).values() if thought)
    benchmark.extra_info["megabytes"] = len(thinking) / 1e6
    measure(benchmark, f"split_spans {len(thinking) / 1e6:.2f} MB", lambda: split_spans(thinking))


@contextmanager
def reported(what: str) -> Iterator[None]:
    """Prints the seconds that the block took, and this process's peak memory."""
    begun, spent = time.perf_counter(), time.process_time()
    yield
    seconds, spent = time.perf_counter() - begun, time.process_time() - spent
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    time_taken = f"{seconds:.2f} s with {text.cores()} threads, {spent:.2f} s of processor time"
    print(f"\n{what}: {time_taken}, peak memory {peak:.2f} GiB", file=sys.stderr)


def test_decontaminate_a_million(evaluations) -> None:
    """The bar: 10 s on two cores, 2 GB in all. One problem in a thousand is an evaluation problem without its `$`."""
    rng = random.Random(2)
    problems = [problem(rng) for _ in range(MILLION)]
    problems[::1000] = [evaluations[i % EVALUATIONS].problem.replace("$", "") for i in range(MILLION // 1000)]
    decontaminator = Decontaminator(evaluations)
    with reported(f"decontaminating {MILLION:,} problems of {np.mean([*map(len, problems)]):.0f} characters"):
        flagged = decontaminate(decontaminator, problems, text.cores())
    assert MILLION // 1000 <= flagged < 1.1 * MILLION // 1000


def test_choose_a_thousand_of_a_million() -> None:
    """The bar: 5 s. Scores and domains are given; tokenising the problems of the shortlist counts."""
    rng = random.Random(3)
    generator = np.random.default_rng(3)
    scores = generator.random(MILLION)
    domains = generator.choice(12, MILLION, p=generator.dirichlet(np.ones(12)))
    ties = np.arange(MILLION, dtype=np.uint64)
    texts = [problem(rng) for _ in range(10_000)]
    chosen = 0
    with reported(f"choosing 1,000 of {MILLION:,}"):
        share = quotas(np.bincount(domains, minlength=12).tolist(), 1000)
        for items, wanted in zip(shortlist(scores, ties, domains, share), share, strict=True):
            packed = text.pack(texts[item % len(texts)] for item in items.tolist())
            chosen += len(select_representatives(packed, wanted, threads=text.cores()))
    assert chosen == 1000
