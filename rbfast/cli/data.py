"""`rbfast convert | curate | teach`: the commands that create training data."""

import argparse
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rbfast.cli.common import (
    DTYPES,
    FILE_ONLY,
    Command,
    add_device,
    add_formats,
    add_instruction,
    add_timeout,
    format_lines,
    format_options,
    instruction_of,
    json_object,
    load_model,
    output_file,
    output_folder,
    positive,
    print_result,
    printable,
    read_and_report_traces,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rbfast.data.signal_store import SignalStore
    from rbfast.data.trace import Trace
    from rbfast.teacher.solutions import Taught

_SHOWN = 5  # the most reasons to print for traces without log-probs


def add_convert(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "source", help="file or folder (JSONL, JSON, Parquet, Arrow, CSV) of any known format, or hub id of a dataset"
    )
    sub.add_argument(
        "-o",
        "--out",
        type=_jsonl_file,
        required=True,
        help=f"JSONL file to write ({FILE_ONLY}); unreadable rows are listed beside it",
    )
    add_formats(sub)


def _jsonl_file(text: str) -> Path:
    """As `output_file`, but only for JSONL names: out.parquet would later be read as Parquet."""
    path = output_file(text)
    if path.suffix not in (".jsonl", ".ndjson"):
        raise argparse.ArgumentTypeError(f"{text}: expected a name that ends in .jsonl, because the output is JSONL")
    return path


def run_convert(args: argparse.Namespace) -> int:
    from rbfast.data.readers import TraceReader, record_of, write_records

    reader = TraceReader(args.source, options=format_options(args), skip=True, patience=None)
    unreadable = args.out.with_suffix(".unreadable.jsonl")
    records = (record_of(trace, row) for trace, row in reader.with_rows())
    first = next(records, None)
    count = 0 if first is None else write_records(args.out, chain([first], records))  # no traces: keep an old file
    unreadable.unlink(missing_ok=True)  # left by an earlier call
    if reader.unreadable:
        reader.write_unreadable(unreadable)
    result = {"out": str(args.out), "traces": count, "unreadable": len(reader.unreadable), "rows": dict(reader.counts)}
    text = f"{reader.summary()}; {f'{count:,} traces in' if count else 'nothing written to'} {args.out}"
    if reader.unreadable:
        text += f"\nunreadable rows are listed, with reasons, in {unreadable}; the first: {reader.unreadable[0][1]}"
    print_result(args, result, text)
    return 0 if count else 1


def add_curate(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "pool", nargs="+", help="files or folders of traces (JSONL, JSON, Parquet, Arrow, CSV), or hub ids of datasets"
    )
    sub.add_argument("-o", "--out", type=output_folder, required=True, help="folder to write")
    sub.add_argument("--size", type=int, default=1000, help="traces to pick (default: 1000)")
    sub.add_argument(
        "--against",
        nargs="+",
        default=[],
        metavar="EVALSET",
        help="evaluation problems to keep out of training: math-500, aime24, aime25, gsm8k, files, folders or hub ids",
    )
    sub.add_argument(
        "--keep-templates",
        action="store_true",
        help="keep problems that differ from an evaluation problem only in numbers",
    )
    sub.add_argument(
        "--pass-rates", type=Path, help="results of `rbfast eval -o`; problems that the student fails count as hard"
    )
    sub.add_argument("--processes", type=int, default=1, help="processes that score (default: 1)")
    sub.add_argument("--ray", metavar="ADDRESS", help="score on a Ray cluster instead: auto, local, or host:port")
    add_formats(sub)


def run_curate(args: argparse.Namespace) -> int:
    from rbfast.curation.curate import CurateConfig, curate, read_pass_rates
    from rbfast.curation.datasheet import pass_rates_line

    config = CurateConfig(
        size=args.size,
        against=args.against,
        seed=args.seed,
        pass_rates=read_pass_rates(args.pass_rates) if args.pass_rates else {},
        keep_templates=args.keep_templates,
        processes=args.processes,
        ray=args.ray,
        formats=format_options(args),
    )
    result = curate(args.pool, args.out, config, quiet=args.json)
    stages = [{"stage": s.name, "in": s.given, "dropped": s.dropped, "out": s.kept} for s in result.stages]
    lines = [f"{source}: read as {' and '.join(names)}" for source, names in result.formats.items()]
    lines += [
        f"{s.name}: {s.given} in, {s.kept} out" + "".join(f"; {why}: {n}" for why, n in s.dropped.items())
        for s in result.stages
    ]
    known = {"pass_rates": result.datasheet["pass_rates"]} if args.pass_rates else {}
    if rates := pass_rates_line(result.datasheet):
        lines.append(rates)
    chosen = args.out / "reason1k.jsonl"
    lines.append(f"{result.selected} traces in {chosen}; see datasheet.html and dropped.jsonl there")
    report = {"out": str(args.out), "selected": result.selected, "stages": stages, **known}
    print_result(args, report, "\n".join(lines))
    return 0 if result.selected else 1


def add_teach(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", help="the teacher's name on its server; with --score and no server: hub id or folder")
    sub.add_argument("source", help="problems (file, hub id, reasoning-gym generator); with --score: traces")
    sub.add_argument(
        "-o", "--out", type=output_folder, required=True, help="folder to write; the same command resumes there"
    )
    sub.add_argument(
        "--server", metavar="URL", help="URL of an OpenAI-compatible server, through /v1; key: RBFAST_API_KEY"
    )
    add_timeout(sub)
    sub.add_argument("--concurrency", type=positive, default=8, help="requests at a time (default: 8)")
    solutions = sub.add_argument_group("solutions")
    solutions.add_argument(
        "--provider",
        metavar="NAME",
        help="a provider with its own API, by litellm's name (anthropic, gemini, ...); key: ANTHROPIC_API_KEY "
        "and the like; needs rbfast[teachers]",
    )
    solutions.add_argument("-n", type=positive, help="problems to ask (default: all, or 50 of a generator)")
    solutions.add_argument("--samples", type=int, default=1, help="solutions per problem (default: 1)")
    solutions.add_argument("--temperature", type=float, default=0.7, help="default: 0.7")
    solutions.add_argument("--reasoning-effort", metavar="LEVEL", help="how long to think: low, medium, high, ...")
    solutions.add_argument(
        "--extra-body", type=json_object, default={}, metavar="JSON", help="JSON object of extra fields in each request"
    )
    solutions.add_argument(
        "--batch",
        action="store_true",
        help="use the batch API of the server (OpenAI's) or the provider (anthropic, gemini): replies within a day, at "
        "lower prices, which --prices must then give",
    )
    solutions.add_argument("--prices", type=float, nargs=2, metavar=("READ", "WRITTEN"), help="per million tokens")
    solutions.add_argument(
        "--max-cost", type=float, help="stop before the cost can exceed this, in the currency of --prices"
    )
    solutions.add_argument("--max-total-tokens", type=int, help="stop before the token total can exceed this")
    scoring = sub.add_argument_group("log-probs")
    scoring.add_argument(
        "--score", action="store_true", help="get log-probs of the traces in SOURCE, not new solutions"
    )
    scoring.add_argument("--student", help="student whose tokens are scored: hub id, local folder, or smollm2-135m")
    scoring.add_argument("-k", type=int, help="candidates per token (default: 32; 20 from a server, a common limit)")
    scoring.add_argument(
        "--align", action="store_true", help="accept a teacher with another tokenizer: score shared tokens"
    )
    scoring.add_argument(
        "--dialect",
        choices=["vllm", "sglang", "echo"],
        default="vllm",
        help="how the server scores prompts: by its own API, or by OpenAI's echo (default: vllm)",
    )
    scoring.add_argument("--dtype", choices=DTYPES, help="dtype of a local teacher")
    sub.add_argument("--max-tokens", type=int, default=4096, help="most tokens per solution or trace (default: 4096)")
    add_instruction(scoring, "boxed if the student's template has thinking, else answer; distill needs the same")
    add_formats(sub)
    add_device(sub)


def run_teach(args: argparse.Namespace) -> int:
    from rbfast.utils.files import lock_folder

    if args.score:
        with lock_folder(args.out):  # two calls would score every trace twice
            return _teach_logprobs(args)
    from rbfast.teacher.solutions import FAILED, Prices, read_questions, teach
    from rbfast.utils.progress import bar

    server = _make_teacher(args)
    student = _open_student(args) if args.student else None  # fail before paying for a reply
    extra = args.extra_body | ({"reasoning_effort": args.reasoning_effort} if args.reasoning_effort else {})
    questions = read_questions(args.source, args.n, args.seed, format_options(args))
    with bar("asking", args.json) as progress:
        task = progress.add_task("", total=len(questions) * args.samples)
        taught = teach(
            server,
            questions,
            args.out,
            samples=args.samples,
            max_tokens=args.max_tokens,
            top_logprobs=_top_k(args) if student else 0,
            concurrency=args.concurrency,
            prices=Prices(*args.prices or (0.0, 0.0)),
            max_cost=args.max_cost,
            max_total_tokens=args.max_total_tokens,
            extra=extra,
            batch=args.batch,
            progress=lambda done, total, words: progress.update(task, completed=done, total=total, description=words),
        )
    result = {"out": str(args.out)} | taught.summary()
    if student:
        result["signals"] = _add_reply_logprobs(args, taught, *student)
    text = format_lines(result)
    if taught.verdicts["wrong"]:
        text += "\nthe traces include those with wrong answers (verified: false); rbfast curate leaves those out"
    if taught.failed:
        text += f"\nfailed replies are listed, with reasons, in {args.out / FAILED}; the first: {taught.first_failure}"
    print_result(args, result, text)
    return 1 if taught.open else 0


def _make_teacher(args: argparse.Namespace) -> Any:
    """The teacher to ask for solutions."""
    common = {"timeout": args.timeout, "temperature": args.temperature, "seed": args.seed}
    if args.provider:
        from rbfast.teacher.providers import Provider

        return Provider(args.provider, args.model, args.server, **common)
    if args.server:
        from rbfast.teacher.client import Server

        return Server(args.server, args.model, **common)
    raise ValueError(
        "solutions need a server: give --server URL or --provider NAME, or --score to get log-probs instead"
    )


def _open_student(args: argparse.Namespace) -> "tuple[PreTrainedTokenizerBase, SignalStore]":
    """The student's tokenizer, and the folder `signals` for log-probs of its tokens."""
    from rbfast.data.signal_store import SignalStore
    from rbfast.models.student import load_tokenizer

    tokenizer = load_tokenizer(args.student)
    return tokenizer, SignalStore(args.out / "signals", args.model, _top_k(args), len(tokenizer))


def _add_reply_logprobs(
    args: argparse.Namespace, taught: "Taught", tokenizer: "PreTrainedTokenizerBase", store: "SignalStore"
) -> int:
    """Store the log-probs that came with the solutions in the folder `signals`, and return how many traces have them.

    Print why the others have none.
    """
    from rbfast.teacher.server_logprobs import add_reply_logprobs

    refused, instruction = [], instruction_of(args, args.student)
    with store:
        for trace, reply in zip(taught.traces, taught.replies, strict=True):
            reason = add_reply_logprobs(trace, reply, tokenizer, store, instruction)
            if reason is not None:
                refused.append((trace, f"{trace.name}: {reason}"))
    _print_refused(refused)
    return len(store)


def _print_refused(refused: "Sequence[tuple[Trace, str]]") -> None:
    """Print why traces have no log-probs: the first few reasons, then the number of other traces."""
    for _, reason in refused[:_SHOWN]:
        print(printable(f"no log-probs: {reason}"), file=sys.stderr)
    if (others := len(refused) - _SHOWN) > 0:
        print(f"no log-probs: {others} more", file=sys.stderr)


def _teach_logprobs(args: argparse.Namespace) -> int:
    from rbfast.teacher.client import Server
    from rbfast.teacher.logprobs import add_local_logprobs
    from rbfast.teacher.server_logprobs import add_server_logprobs
    from rbfast.utils.progress import counting

    if not args.student:
        raise ValueError("--score needs --student: log-probs are kept for the tokens of one student")
    traces = read_and_report_traces(args, args.source, args.out / "unreadable.jsonl")
    tokenizer, store = _open_student(args)
    with store, counting("reading", args.json) as progress:
        options: dict[str, Any] = {"align": args.align, "max_tokens": args.max_tokens, "progress": progress}
        options["instruction"] = instruction_of(args, args.student)
        if args.server:
            server = Server(args.server, args.model, timeout=args.timeout)
            options |= {"dialect": args.dialect, "concurrency": args.concurrency}
            refused = add_server_logprobs(server, traces, tokenizer, store, **options)
        else:
            teacher, teacher_tokenizer = load_model(args)
            refused = add_local_logprobs(teacher, teacher_tokenizer, traces, tokenizer, store, **options)
    _print_refused(refused)
    result = {"out": str(args.out / "signals"), "scored": len(store), "refused": len(refused)}
    print_result(args, result, format_lines(result))
    return 0 if len(store) else 1


def _top_k(args: argparse.Namespace) -> int:
    default = 20 if args.server or args.provider else 32
    return default if args.k is None else args.k


CONVERT = Command(
    name="convert",
    summary="Convert traces of any known shape to rbfast's JSONL.",
    example="rbfast convert s1k.parquet -o traces.jsonl --map answer=solution",
    add_arguments=add_convert,
    run=run_convert,
)
CURATE = Command(
    name="curate",
    summary="Pick the traces to train on from a pool: Reason1K with its datasheet.",
    example="rbfast curate pool.jsonl more.parquet -o reason1k/ --size 1000 --against math-500 aime25",
    add_arguments=add_curate,
    run=run_curate,
)
TEACH = Command(
    name="teach",
    summary="Get solutions from a teacher, or its log-probs of traces.",
    example="rbfast teach their-model problems.jsonl -o taught/ --server https://api.example.com/v1 --samples 2",
    add_arguments=add_teach,
    run=run_teach,
    resumes=True,
)
