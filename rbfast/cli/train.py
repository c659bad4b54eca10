"""`rbfast distill | merge | export-lora | report | demo`: train an adapter, and write, merge or report it."""

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rbfast.cli.common import (
    AUTO,
    DTYPES,
    FILE_ONLY,
    TRAINED_WITH,
    Command,
    add_device,
    add_formats,
    add_instruction,
    add_load_in,
    add_model,
    attach_adapter,
    device_of,
    format_lines,
    format_options,
    instruction_of,
    load_model,
    output_file,
    output_folder,
    positive,
    print_result,
    read_and_report_traces,
)
from rbfast.utils.processes import is_first_process

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rbfast.adapter.sparse_adapter import SparseAdapter
    from rbfast.data.instruction import Instruction
    from rbfast.data.trace import Trace
    from rbfast.on_policy.served_teacher import ServedTeacher
    from rbfast.training.distill import Run
    from rbfast.training.distill_config import DistillConfig


def add_distill(sub: argparse.ArgumentParser) -> None:
    add_model(sub)
    add_load_in(sub)
    sub.add_argument("traces", help="file or folder (JSONL, JSON, Parquet, Arrow, CSV), or the hub id of a dataset")
    sub.add_argument(
        "-o", "--out", type=output_folder, required=True, help="folder of the run; an interrupted run resumes"
    )
    sub.add_argument("--signals", type=Path, help="folder of a teacher's log-probs that `rbfast teach` wrote")
    sub.add_argument("--teacher", help="model with the student's tokens to run beside it: hub id or local folder")
    sub.add_argument("--adapter", help="folder or hub id of an adapter of MODEL to train further (default: a new one)")
    sub.add_argument(
        "--held-out",
        type=_share_or_source,
        metavar="SHARE|FILE",
        help="traces to measure the loss on at every checkpoint: a share of the problems in TRACES, which is then left "
        "out of training, or a file of other traces",
    )
    sub.add_argument(
        "--keep-best",
        action="store_true",
        help="end with the checkpoint of lowest held-out loss, not the last one",
    )
    sub.add_argument("--density", type=float, help="trainable values / all parameters, at most (default: 0.003)")
    sub.add_argument("--rank", type=int, help="rank of each delta (default: what the density allows)")
    sub.add_argument("--support", type=int, help="input columns of each delta (default: what the density allows)")
    sub.add_argument(
        "--targets",
        nargs="+",
        metavar="NAME",
        help="linear layers to train: names or their ends, such as q_proj, or only all-linear (default: all-linear, "
        "which leaves out the head)",
    )
    sub.add_argument(
        "--placement",
        choices=["gradient", "factored", "activation", "random"],
        help="which columns: at random, or those that score best on some traces (default: random)",
    )
    sub.add_argument("--placement-traces", type=int, help="traces to score the columns on (default: 64)")
    sub.add_argument("--epochs", type=float, help="passes over the traces (default: 1)")
    sub.add_argument("--batch-size", type=int, help="traces per batch and process (default: 8)")
    sub.add_argument(
        "--tokens-per-batch",
        type=int,
        metavar="N",
        help="fill batches up to N tokens, not up to --batch-size traces; a longer trace is alone in its batch",
    )
    sub.add_argument("--accumulation", type=int, help="batches per process and optimizer step (default: 1)")
    sub.add_argument(
        "--gradient-checkpointing",
        action="store_true",
        default=None,
        help="recompute each layer in the backward pass: a third slower, far less memory",
    )
    sub.add_argument("--learning-rate", type=float, help="peak learning rate of AdamW (default: 0.01)")
    sub.add_argument("--warmup", type=float, help="share of the steps before the peak (default: 0.05)")
    sub.add_argument("--schedule", choices=["linear", "cosine", "constant"], help="after the peak (default: linear)")
    sub.add_argument(
        "--shard", type=positive, metavar="PROCESSES", help="spread each copy of MODEL over this many processes"
    )
    sub.add_argument("--max-tokens", type=int, help="leave longer traces out, and list them (default: 4096)")
    sub.add_argument("--save-steps", type=int, help="steps between checkpoints (default: 50)")
    sub.add_argument(
        "--report-to",
        nargs="+",
        default=(),
        metavar="TRACKER",
        help="trackers to send the losses to, such as wandb, tensorboard, mlflow or trackio",
    )
    sub.add_argument("--turns", choices=["last", "all"], help="replies of a conversation to train (default: last)")
    add_instruction(sub, TRAINED_WITH)
    sub.add_argument("--plan", action="store_true", help="print the memory that the run would take, without training")
    add_formats(sub)
    _add_objective(sub)
    _add_on_policy(sub)


def _add_objective(sub: argparse.ArgumentParser) -> None:
    group = sub.add_argument_group("loss", "for each role: strategic, tactical and answer tokens")
    roles = ("STRATEGIC", "TACTICAL", "ANSWER")
    group.add_argument("--role-weights", type=float, nargs=3, metavar=roles, help="default: 0.4 0.5 0.1")
    group.add_argument(
        "--anneal", type=float, help="share of the strategic weight moved to the tactical (default: 0.5)"
    )
    group.add_argument(
        "--temperature", type=float, nargs="+", help="of the loss: one for all roles, or one for each role (default: 1)"
    )
    group.add_argument(
        "--beta", type=float, help="0 forward KL, 1 reverse KL, between: Jensen-Shannon (default: 0; 1 with --rounds)"
    )
    group.add_argument(
        "--ce-weight",
        type=float,
        dest="ce_share",
        metavar="SHARE",
        help="weight of the cross-entropy of tokens with a teacher's log-probs; the divergence gets the rest (default: "
        "0.5; 0 with --rounds)",
    )
    group.add_argument("--gradient-filter", type=float, help="share of a gradient that a CPU may skip (default: 0)")


def _add_on_policy(sub: argparse.ArgumentParser) -> None:
    group = sub.add_argument_group(
        "on-policy",
        "with --rounds the student writes the text, and --teacher corrects it; TRACES are problems, answers optional",
    )
    group.add_argument("--rounds", type=positive, help="number of rounds; in each the student writes, then trains")
    group.add_argument("--samples", type=positive, help="completions per problem (default: 1)")
    group.add_argument("--max-new-tokens", type=positive, help="most tokens in a completion (default: 512)")
    group.add_argument("--sample-batch-size", type=positive, help="completions written at a time (default: 32)")
    group.add_argument(
        "--server",
        metavar="URL",
        help="URL of the server that runs --teacher, through /v1; key: RBFAST_API_KEY (default: run it beside the "
        "student)",
    )
    group.add_argument("--dialect", choices=["vllm", "sglang"], help="kind of server (default: vllm)")
    group.add_argument("-k", type=positive, help="candidates per token from the server (default: 20)")
    group.add_argument("--concurrency", type=positive, help="requests to the server at a time (default: 8)")


def run_distill(args: argparse.Namespace) -> int:
    from rbfast.training.distill import distill, plan_run

    config = _distill_config(args)
    if args.rounds:
        return _run_rounds(args, config)
    if only := _given(args, "samples", "max_new_tokens", "sample_batch_size", "server", "dialect", "k", "concurrency"):
        raise ValueError(f"{only[0]} needs --rounds, in which the student writes: add that, or leave {only[0]} out")
    traces = read_and_report_traces(args, args.traces, args.out / "unreadable.jsonl")
    if (wrong := sum(trace.verified is False for trace in traces)) and is_first_process():
        print(
            f"{wrong} of {len(traces)} traces have a wrong answer (verified: false); rbfast curate leaves those out",
            file=sys.stderr,
        )
    held_out = _held_out(args)
    model, tokenizer, teacher = _load_models(args)
    extra = {"teacher": teacher, "adapter": args.adapter, "held_out": held_out}
    if args.plan:
        plan = plan_run(model, tokenizer, traces, config, args.json, **extra)
        return print_result(args, plan.to_dict(), str(plan))
    try:
        extra |= {"signals": args.signals, "keep_best": args.keep_best, "report_to": args.report_to}
        run = distill(model, tokenizer, traces, args.out, config, args.json, **extra)
    except KeyboardInterrupt:
        print(_resume_message(args.out, config), file=sys.stderr)
        raise
    return _print_run(args, run) if is_first_process() else 0  # only the first process prints


def _run_rounds(args: argparse.Namespace, config: "DistillConfig") -> int:
    from rbfast.on_policy.rounds import check_config, distill_on_policy, plan_on_policy
    from rbfast.on_policy.samples import Writing
    from rbfast.teacher.solutions import read_questions

    if given := _given(args, "signals", "held_out", "keep_best", "shard"):
        raise ValueError(f"{given[0]} has no meaning with --rounds: leave one of them out")
    if args.teacher is None:
        raise ValueError("--rounds needs --teacher: a model that corrects what the student writes")
    check_config(config)
    options = {"samples": args.samples, "max_new_tokens": args.max_new_tokens, "batch_size": args.sample_batch_size}
    writing = Writing(**{name: value for name, value in options.items() if value})
    served = _served_teacher(args)
    questions = read_questions(args.traces, seed=args.seed, options=format_options(args))
    model, tokenizer, teacher = _load_models(args)
    arguments = {"teacher": served or teacher, "rounds": args.rounds, "writing": writing, "adapter": args.adapter}
    if args.plan:
        plan = plan_on_policy(model, tokenizer, questions, config, **arguments)
        return print_result(args, plan.to_dict(), str(plan))
    try:
        run = distill_on_policy(
            model, tokenizer, questions, args.out, config, args.json, report_to=args.report_to, **arguments
        )
    except KeyboardInterrupt:
        print(f"the completions are kept; training: {_resume_message(args.out, config)}", file=sys.stderr)
        raise
    return _print_run(args, run) if is_first_process() else 0


def _served_teacher(args: argparse.Namespace) -> "ServedTeacher | None":
    from rbfast.on_policy.served_teacher import ServedTeacher
    from rbfast.teacher.client import Server

    if not args.server:
        if only := _given(args, "dialect", "k", "concurrency"):
            raise ValueError(f"{only[0]} needs --server: without one, the teacher runs beside the student")
        return None
    options = {"dialect": args.dialect, "k": args.k, "concurrency": args.concurrency}
    return ServedTeacher(
        Server(args.server, args.teacher), **{name: value for name, value in options.items() if value is not None}
    )


def _given(args: argparse.Namespace, *names: str) -> list[str]:
    """The options among these that were given, as on the command line."""
    return [f"{'-' if len(name) == 1 else '--'}{name.replace('_', '-')}" for name in names if getattr(args, name)]


def _print_run(args: argparse.Namespace, run: "Run") -> int:
    from rbfast.report.plots import draw_losses, save

    save(draw_losses(run.log_history), args.out / "losses.png")
    if run.found:
        print(
            f"already finished: the adapter is in {args.out}, nothing was trained; to train again, choose another "
            "folder or remove this one",
            file=sys.stderr,
        )
    if run.skipped:
        print(f"{len(run.skipped)} traces left out, see {args.out / 'skipped.jsonl'}", file=sys.stderr)
    result = _summarize_run(run, args.out)
    if args.json and run.plan is not None:
        result["plan"] = run.plan.to_dict()
    return print_result(args, result, format_lines(result))


def _share_or_source(text: str) -> float | str:
    """Parse an argument that is a share or the name of a source of traces."""
    try:
        share = float(text)
    except ValueError:
        return text
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"expected a share above 0 and below 1, or a file, got {text}")
    return share


def _held_out(args: argparse.Namespace) -> "list[Trace] | float | None":
    if args.held_out is None:
        if args.keep_best:
            raise ValueError("--keep-best compares checkpoints by the loss of held-out traces: give --held-out too")
        return None
    if isinstance(args.held_out, float):
        return args.held_out
    return read_and_report_traces(args, args.held_out, args.out / "held_out.unreadable.jsonl")


def _distill_config(args: argparse.Namespace) -> "DistillConfig":
    """The default config with the options of the command line."""
    from rbfast.training.distill_config import DistillConfig
    from rbfast.training.objective import Objective

    on_policy = {"beta": 1.0, "ce_share": 0.0} if args.rounds else {}
    objective = (
        on_policy
        | _given_options(args, Objective)
        | _by_role("", args.role_weights)
        | _by_role("_temperature", args.temperature)
    )
    options = _given_options(args, DistillConfig)
    if "all-linear" in (args.targets or ()):
        if len(args.targets) > 1:
            raise ValueError("--targets: all-linear covers all layers, got other names too; leave out it or them")
        options["targets"] = "all-linear"
    return DistillConfig(**options, objective=Objective(**objective))


def _given_options(args: argparse.Namespace, kind: type) -> dict[str, Any]:
    """The arguments that are fields of a dataclass and were given."""
    names = (field.name for field in fields(kind))
    return {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}


def _by_role(suffix: str, values: list[float] | None) -> dict[str, float]:
    if not values:
        return {}
    if len(values) not in (1, 3):
        raise ValueError(f"temperature: expected 1 number, or 3 (strategic, tactical, answer), got {len(values)}")
    every = values * 3 if len(values) == 1 else values
    return {f"{role}{suffix}": value for role, value in zip(("strategic", "tactical", "answer"), every, strict=True)}


def _load_models(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """The student, its tokenizer and the teacher (or None); with --shard the models are spread over processes."""
    from rbfast.models.student import load_teacher

    if args.shard and args.load_in:
        raise ValueError("--load-in and --shard cannot be combined: a quantised model must fit on one device; drop one")
    if args.shard and args.device == AUTO:
        raise ValueError("--shard spreads a model over processes, and --device auto over the GPUs of one: drop one")
    device, is_spread = device_of(args), args.device == AUTO
    model, tokenizer = load_model(args, "cpu" if args.shard else None)  # a sharded model need not fit on one device
    teacher = None
    if args.teacher and not args.server:
        teacher = load_teacher(args.teacher, tokenizer, model.dtype, device=AUTO if is_spread else "cpu")
        teacher = teacher if is_spread else teacher.to(model.device)
    if args.shard:
        from rbfast.training.sharding import shard

        for base in (model, teacher):
            if base is not None:
                shard(base, args.shard, device)
    return model, tokenizer, teacher


def _resume_message(out: Path, config: "DistillConfig") -> str:
    """A message that says where an interrupted run will resume."""
    from rbfast.training.checkpoints import last_checkpoint

    checkpoint = last_checkpoint(out / "checkpoints")
    if checkpoint is not None:
        return f"it will resume from {checkpoint}"
    return f"there is no checkpoint yet (one every {config.save_steps} steps: --save-steps), so it will start over"


def _summarize_run(run: "Run", out: Path) -> dict[str, Any]:
    # The losses at the first and the last step with tokens of each role, before that step's update.
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    for entry in run.log_history:
        losses = {name: loss for name, loss in entry.items() if name.startswith("loss_")}
        first, last = losses | first, last | losses
    result = {
        "out": str(out),
        "trained": run.traces,
        "skipped": len(run.skipped),
        "trainable_percent": run.adapter.trainable_percent,
        "steps": sum("loss" in entry for entry in run.log_history),
        "seconds": run.seconds,
        **{f"first_{name}": first[name] for name in sorted(first)},
        **{f"last_{name}": last[name] for name in sorted(last)},
    }
    if measured := [(entry["eval_loss"], entry["step"]) for entry in run.log_history if "eval_loss" in entry]:
        result |= {"first_held_out_loss": measured[0][0], "last_held_out_loss": measured[-1][0]}
        result |= dict(zip(("best_held_out_loss", "best_step"), min(measured), strict=True))
    return result | ({"already_finished": True} if run.found else {})


def add_merge(sub: argparse.ArgumentParser) -> None:
    add_model(sub, dtype="the one that the adapter was trained in")
    sub.add_argument("adapter", nargs="?", help="folder or hub id of a trained adapter")
    sub.add_argument("-o", "--out", type=output_folder, required=True, help="folder to write")
    sub.add_argument(
        "--base-only",
        action="store_true",
        help="write MODEL unchanged, without an adapter: a base for an exported LoRA",
    )


def _trained_with(args: argparse.Namespace, tokenizer: Any) -> "Instruction":
    from rbfast.data.chat_template import default_instruction

    return instruction_of(args, args.adapter, args.model) or default_instruction(tokenizer)


def run_merge(args: argparse.Namespace) -> int:
    from rbfast.adapter.adapter_files import CONFIG_FILE, adapter_folder, read_config
    from rbfast.training.merged_model import save_checkpoint, save_merged

    if args.base_only == (args.adapter is not None):
        raise ValueError("name an adapter to merge, or give --base-only to write MODEL unchanged; not both")
    if args.dtype is None and args.adapter is not None:
        trained_in = read_config(adapter_folder(args.adapter) / CONFIG_FILE).base_dtype
        args.dtype = trained_in if trained_in in DTYPES else None
    model, tokenizer = load_model(args)
    if args.base_only:
        save_checkpoint(model, tokenizer, args.out)
    else:
        attach_adapter(model, args.adapter).merge()
        save_merged(model, tokenizer, args.out, _trained_with(args, tokenizer))
    return print_result(args, {"out": str(args.out)}, f"wrote {args.out}")


def add_export_lora(sub: argparse.ArgumentParser) -> None:
    add_model(sub)
    sub.add_argument("adapter", help="folder or hub id of a trained adapter")
    sub.add_argument("-o", "--out", type=output_folder, required=True, help="folder to write")
    sub.add_argument("--base", help="base model to name in the LoRA: hub id or folder (default: MODEL's hub id)")


def run_export_lora(args: argparse.Namespace) -> int:
    from rbfast.data.chat_template import write_prompt

    model, tokenizer = load_model(args)
    adapter = attach_adapter(model, args.adapter)
    if args.base is not None and Path(args.base).exists():
        _check_fits(args.base, adapter, model)
    adapter.export_lora(args.out, args.base)
    write_prompt(args.out, tokenizer, _trained_with(args, tokenizer))
    return print_result(args, {"out": str(args.out)}, f"wrote {args.out}")


def _check_fits(base: str, adapter: "SparseAdapter", model: "PreTrainedModel") -> None:
    """Raise ValueError if the local model `base` differs from the adapter's base in matrix shapes or vocabulary size.
    Weights are not compared."""
    from rbfast.adapter.adapter_files import check_base
    from rbfast.models.linears import named_modules
    from rbfast.models.student import load_without_weights

    named = load_without_weights(base)
    check_base(adapter.config, named_modules(named), f"--base {base}: not the base of this adapter")
    theirs, ours = (one.config.get_text_config().vocab_size for one in (named, model))
    if theirs != ours:
        raise ValueError(
            f"--base {base}: not the base of this adapter, because its vocabulary has {theirs} tokens, not {ours}; "
            "name the model that it was trained on"
        )


def add_report(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="folder that distill or demo wrote; results of `rbfast eval -o` in it are shown: a file whose name begins "
        "with before is of the base model, any other of the trained model",
    )
    sub.add_argument("-o", "--out", type=output_file, required=True, help=f"HTML file to write ({FILE_ONLY})")


def run_report(args: argparse.Namespace) -> int:
    from rbfast.report.run_report import write_report

    write_report(args.runs, args.out)
    return print_result(args, {"out": str(args.out)}, f"wrote {args.out}")


def add_demo(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--out", type=output_folder, default="runs/demo", help="folder to write (default: runs/demo)")
    sub.add_argument("--seeds", type=int, default=1, help="number of seeds to run, from --seed on (default: 1)")
    add_device(sub)


def run_demo(args: argparse.Namespace) -> int:
    from rich.console import Console

    from rbfast.demo.run import print_summary, run_demo, run_seeds

    if args.seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {args.seeds}")
    if args.seeds == 1:
        summary = run_demo(args.out, device_of(args), args.seed, quiet=args.json)
    else:
        seeds = range(args.seed, args.seed + args.seeds)
        summary = run_seeds(args.out, seeds, device_of(args), quiet=args.json)
    if args.json:
        return print_result(args, summary, "")
    print_summary(summary, Console())
    folder = args.out if args.seeds == 1 else f"{args.out}/seed{args.seed}"
    print(f"see {args.out}: report.html, summary.json; {folder}: the adapter, losses.png, placement.png, accuracy.png")
    return 0


DISTILL = Command(
    name="distill",
    summary="Train a sparse adapter of MODEL on reasoning traces.",
    example="rbfast distill smollm2-135m reason1k.jsonl -o runs/first --epochs 2",
    add_arguments=add_distill,
    run=run_distill,
    resumes=True,
)
MERGE = Command(
    name="merge",
    summary="Write MODEL with an adapter merged into its weights, as a plain checkpoint.",
    example="rbfast merge smollm2-135m runs/first -o merged/",
    add_arguments=add_merge,
    run=run_merge,
)
EXPORT_LORA = Command(
    name="export-lora",
    summary="Write an adapter as a standard LoRA for PEFT, vLLM or llama.cpp.",
    example="rbfast export-lora smollm2-135m runs/first -o lora/",
    add_arguments=add_export_lora,
    run=run_export_lora,
)
REPORT = Command(
    name="report",
    summary="Write one page about runs: losses, placement, accuracy, examples, cost.",
    example="rbfast report runs/first runs/second -o report.html",
    add_arguments=add_report,
    run=run_report,
)
DEMO = Command(
    name="demo",
    summary="Distill five task families into a 135M student; accuracy before and after.",
    example="rbfast demo --out runs/demo",
    add_arguments=add_demo,
    run=run_demo,
    resumes=True,
)
