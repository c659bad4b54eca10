"""`rbfast solve | eval`: the commands that run inference."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rbfast.cli.common import (
    FILE_ONLY,
    TRAINED_WITH,
    Command,
    add_formats,
    add_instruction,
    add_load_in,
    add_model,
    add_timeout,
    attach_adapter,
    format_lines,
    format_options,
    instruction_of,
    load_model,
    output_file,
    positive,
    print_result,
)
from rbfast.teacher.client import REFUSED, ServerError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rbfast.cli.transcript import Transcript
    from rbfast.evaluation.evaluate import Result
    from rbfast.grading.grade import Problem
    from rbfast.inference.guide import Limits
    from rbfast.inference.solver import Solution, Solver
    from rbfast.teacher.client import Server

_ALL = "all"  # the value of -n for every problem of a task
_PROBLEMS = 50  # problems per task without -n
_TOKENS = 512  # tokens per completion without --max-new-tokens
_NO_LIMITS = {"budget": None, "minimum": 0, "maximum": None, "verify_above": None, "probe_every": 0}


def add_solve(sub: argparse.ArgumentParser) -> None:
    add_model(sub)
    add_load_in(sub)
    sub.add_argument("problem", help="the problem, or - to read it from stdin")
    sub.add_argument("--adapter", help="folder or hub id of a trained adapter to attach")
    _add_server(sub)
    sub.add_argument("--concurrency", type=int, default=8, help="requests to a server at a time (default: 8)")
    _add_limits(sub, budget=1024)
    _add_sampling(sub, "completions that vote on the answer (default: 1)")
    add_instruction(sub, TRAINED_WITH)


def _add_server(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--server", metavar="URL", help="ask an OpenAI-compatible server for MODEL; key: RBFAST_API_KEY")
    sub.add_argument("--tokenizer", metavar="NAME", help="hub id or folder of the served model, for its chat template")
    add_timeout(sub)


def _add_limits(sub: argparse._ActionsContainer, budget: int | None) -> None:
    """The options for the limits of a guide. budget: the default; None: no guide."""
    shown = "no guide" if budget is None else budget
    sub.add_argument(
        "--budget", type=int, default=budget, help=f"most tokens in all, thinking and answer (default: {shown})"
    )
    sub.add_argument("--minimum", type=int, default=0, help="fewest tokens of thinking (default: 0)")
    sub.add_argument("--maximum", type=int, help="most tokens of thinking (default: all not reserved for the answer)")
    sub.add_argument(
        "--verify-above", type=float, help="insert a check above this mean entropy, in nats (default: never)"
    )
    sub.add_argument("--probe-every", type=int, default=0, help="tokens between probes of the answer (default: never)")


def _limits(args: argparse.Namespace) -> "Limits":
    from rbfast.inference.guide import Limits

    return Limits(**{name: getattr(args, name) for name in _NO_LIMITS})


def _check_server(args: argparse.Namespace) -> None:
    if args.server and args.adapter:
        raise ValueError("--adapter is for a local model: merge it, and serve the merged checkpoint")
    if args.server and (args.load_in or args.dtype):
        raise ValueError(f"--{'load-in' if args.load_in else 'dtype'} is for a local model: a server has its own")
    if args.tokenizer and not args.server:
        raise ValueError("--tokenizer is for --server: a local model uses its own tokenizer, so leave it out")


def _add_sampling(sub: argparse.ArgumentParser, samples: str) -> None:
    sub.add_argument("--samples", type=int, default=1, help=samples)
    sub.add_argument("--temperature", type=float, help="default: 0 (greedy) for one sample, 0.8 for several")
    sub.add_argument("--top-p", type=float, help="sample from this share of the probability mass (default: 1)")


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    temperature = args.temperature
    if temperature is None:
        temperature = 0.0 if args.samples == 1 else 0.8
    if args.top_p is not None and temperature == 0:
        raise ValueError("--top-p is for sampling: also give a --temperature above 0")
    top_p = 1.0 if args.top_p is None else args.top_p
    return {"samples": args.samples, "temperature": temperature, "top_p": top_p, "seed": args.seed}


def run_solve(args: argparse.Namespace) -> int:
    from rbfast.cli.transcript import Transcript
    from rbfast.inference.guide import Guide
    from rbfast.inference.solver import Interrupted, Sampling

    problem = _read_stdin() if args.problem == "-" else args.problem
    if not problem.strip():
        raise ValueError("problem: expected a text, got an empty one")
    _check_server(args)
    limits = _limits(args)
    sampling = Sampling(**_sampling(args))
    transcript = Transcript(quiet=args.json or args.samples > 1)
    listen = None if transcript.quiet else lambda _, kind, text: transcript.write(kind, text)
    solver = _server_solver(args) if args.server else _local_solver(args)
    try:
        [solutions] = solver.solve([problem], Guide(limits, solver.phrases()), sampling, listen=listen)
    except ServerError as error:
        if args.json and error.partial:
            written = [solution.to_dict() for solution in error.partial]
            print_result(args, {"answer": None, "error": str(error), "solutions": written}, "")
        raise
    except Interrupted as stop:
        if stop.partial[0]:  # paid for
            _print_solutions(args, stop.partial[0], transcript)
        raise
    return _print_solutions(args, solutions, transcript)


def _server_solver(args: argparse.Namespace) -> "Solver":
    from rbfast.inference.remote import ServerSolver

    server, tokenizer = _load_server(args, guided=True)
    return ServerSolver(server, tokenizer, args.concurrency, instruction_of(args, args.tokenizer))


def _load_server(args: argparse.Namespace, guided: bool) -> "tuple[Server, PreTrainedTokenizerBase | None]":
    from rbfast.models.student import load_tokenizer
    from rbfast.teacher.client import Server

    if guided and not args.tokenizer:
        print("no --tokenizer: the prompt is plain text, not the model's chat template", file=sys.stderr)
    server = Server(args.server, args.model, timeout=args.timeout)
    return server, load_tokenizer(args.tokenizer) if args.tokenizer else None


def _local_solver(args: argparse.Namespace) -> "Solver":
    from rbfast.inference.local import LocalSolver

    model, tokenizer = _load_local(args)
    return LocalSolver(model, tokenizer, instruction=instruction_of(args, args.adapter, args.model))


def _load_local(args: argparse.Namespace) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    model, tokenizer = load_model(args)
    if args.adapter:
        attach_adapter(model, args.adapter)
    return model, tokenizer


def _print_solutions(args: argparse.Namespace, solutions: "Sequence[Solution]", transcript: "Transcript") -> int:
    from rbfast.data.answers import final_answer
    from rbfast.inference.solver import vote_of

    vote = vote_of(solutions)
    answer = _as_written(solutions, vote.answer) if len(solutions) > 1 else final_answer(solutions[0].text)
    text = transcript.last_line(answer, sum(solution.tokens for solution in solutions), len(solutions), vote.votes)
    result = {"answer": answer, "votes": vote.votes, "solutions": [solution.to_dict() for solution in solutions]}
    return print_result(args, result, text)


def _as_written(solutions: "Sequence[Solution]", winner: str | None) -> str | None:
    """The winner of a vote, spelled as in its first sample: a vote counts `Paris` as `paris`, `B` as `b`."""
    from rbfast.data.answers import final_answer
    from rbfast.grading.grade import answer_key

    whole = [solution.text for solution in solutions if not (solution.abandoned or solution.truncated)]
    given = next((text for text in whole if answer_key(text) == winner), "") if winner else ""
    return final_answer(given) or winner


def _read_stdin() -> str:
    data = sys.stdin.buffer.read()  # UTF-8 whatever the locale says
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"problem: expected UTF-8 on stdin, got byte {data[error.start]:#04x}") from None


def add_eval(sub: argparse.ArgumentParser) -> None:
    add_model(sub)
    add_load_in(sub)
    sub.add_argument(
        "--task",
        action="append",
        required=True,
        help="math-500, aime24, aime25, gsm8k, a reasoning-gym generator, a file or folder (JSONL, JSON, Parquet, "
        "Arrow, CSV), or a dataset on the hub: owner/name, owner/name:split or owner/name:config:split; repeat",
    )
    sub.add_argument("--adapter", help="folder or hub id of a trained adapter to attach")
    sub.add_argument(
        "-n",
        type=_positive_or_all,
        help=f"problems per task, or {_ALL} of a file or dataset (default: {_PROBLEMS}, or all if it has fewer)",
    )
    _add_server(sub)
    _add_sampling(sub, "completions per problem (default: 1)")
    sub.add_argument(
        "--max-new-tokens", type=int, help=f"tokens per completion, at most (default: {_TOKENS}, or --budget)"
    )
    sub.add_argument(
        "--batch-size", type=positive, default=32, help="completions, or requests to a server, at a time (default: 32)"
    )
    sub.add_argument(
        "-o",
        "--out",
        type=output_file,
        help=f"JSONL file of every completion ({FILE_ONLY}); the same command resumes from it",
    )
    add_instruction(sub, TRAINED_WITH)
    guided = sub.add_argument_group("guided", "with --budget, a guide steers the thinking: docs/guidance.md")
    _add_limits(guided, budget=None)
    add_formats(sub)


def _positive_or_all(text: str) -> int | str:
    return _ALL if text == _ALL else positive(text)


def _problems(args: argparse.Namespace, task: str) -> "list[Problem]":
    from rbfast.grading.tasks import load_problems

    wanted = None if args.n == _ALL else args.n or _PROBLEMS
    problems = load_problems(task, wanted, args.seed, fewer=args.n is None, options=format_options(args))
    if not problems:
        raise ValueError(f"{task}: expected at least one problem, got none")
    return problems


def run_eval(args: argparse.Namespace) -> int:
    from rbfast.evaluation.evaluate import evaluate
    from rbfast.inference.guide import Guide
    from rbfast.inference.tokens import phrases_for
    from rbfast.utils.progress import counting

    _check_server(args)
    sampling, limits = _sampling(args), _eval_limits(args)
    problems = {task: _problems(args, task) for task in args.task}
    model, tokenizer = _load_server(args, guided=limits is not None) if args.server else _load_local(args)
    instruction = instruction_of(args, *([args.tokenizer] if args.server else [args.adapter, args.model]))
    guide = Guide(limits, phrases_for(tokenizer, instruction)) if limits else None
    label, results, refused = _label(args), {}, []
    for task, items in problems.items():
        with counting(task, args.json) as progress:
            try:
                results[task] = evaluate(
                    model,
                    tokenizer,
                    items,
                    max_new_tokens=_TOKENS if args.max_new_tokens is None else args.max_new_tokens,
                    batch_size=args.batch_size,
                    keep=args.out,
                    label=label,
                    instruction=instruction,
                    guide=guide,
                    progress=progress,
                    **sampling,
                )
            except ServerError as error:
                if error.status not in REFUSED:
                    raise
                refused.append(error)  # concerns problems of this task alone
    if results:
        print_result(args, *_summary(results, args.samples))
    if refused:
        raise refused[0]
    return 0


def _summary(results: "Mapping[str, Sequence[Result]]", samples: int) -> tuple[dict[str, Any], str]:
    """The statistics of each task, and the text to print."""
    from rbfast.evaluation.evaluate import summarize, summarize_samples

    if samples > 1:
        sampled = {task: summarize_samples(of_task) for task, of_task in results.items()}
        return sampled, "\n".join(f"{task}\n{format_lines(s)}" for task, s in sampled.items())
    summary = {task: summarize(of_task) for task, of_task in results.items()}
    return summary, "\n".join(
        f"{task}: {100 * s['accuracy']:.1f}% ({100 * s['ci_low']:.1f} .. {100 * s['ci_high']:.1f}), n={s['n']}, "
        f"{100 * s['truncated']:.0f}% cut at the limit"
        for task, s in summary.items()
    )


def _eval_limits(args: argparse.Namespace) -> "Limits | None":
    """The limits of the guide; None without --budget."""
    if args.budget is None:
        if given := [name for name, absent in _NO_LIMITS.items() if getattr(args, name) != absent]:
            raise ValueError(f"--{given[0].replace('_', '-')} is for a guide, which needs a --budget in tokens")
        return None
    if args.max_new_tokens is not None:
        raise ValueError("--budget limits the whole completion: leave out --max-new-tokens")
    return _limits(args)


def _label(args: argparse.Namespace) -> str:
    """A label for the evaluated model and adapter. The modification time and the digest in it change if they are
    retrained."""
    if args.server:
        template = f", tokenizer {args.tokenizer}" if args.tokenizer else ""
        return f"{args.model} on a server{template}"  # at any URL: a restarted server may have another
    names = [args.model, args.dtype, *([args.load_in] if args.load_in else [])]
    if changed := _last_written(args.model):  # 0 for a model on the hub
        names.append(changed)
    if args.adapter:
        from rbfast.adapter.adapter_files import adapter_digest

        names += [args.adapter, adapter_digest(args.adapter)]  # one on the hub may be downloaded again: no time of it
    return " ".join(map(str, names))


def _last_written(name: str) -> int:
    """The modification time [ns] of the weights in a folder or a GGUF file; 0 if there are none."""
    path = Path(name)
    files = [path] if path.is_file() else path.glob("*.safetensors")
    return max((file.stat().st_mtime_ns for file in files), default=0)


SOLVE = Command(
    name="solve",
    summary="Solve a problem within a token budget, and show the guided thinking.",
    example='rbfast solve smollm2-135m "A farm has 3 cows and 2 hens. How many legs?" --budget 400',
    add_arguments=add_solve,
    run=run_solve,
)
EVAL = Command(
    name="eval",
    summary="Measure accuracy on generated problems or a file of problems.",
    example="rbfast eval smollm2-135m --adapter runs/first --task leg_counting --task chain_sum -n 50",
    add_arguments=add_eval,
    run=run_eval,
    resumes=True,
)
