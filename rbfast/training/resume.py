"""Checks that a folder holds the requested run: a run resumes only with the settings that it started with."""

import json
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers import PreTrainedModel

from rbfast.adapter.adapter_files import check_holds_no_model
from rbfast.training.run_folder import LOG, RUN
from rbfast.utils.processes import process_count
from rbfast.utils.records import read_json

_OPTIONAL = "quantised", "signals", "teacher", "adapter", "held_out", "on_policy"  # settings that only some runs have


def run_settings(model: PreTrainedModel, config: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run apart from its traces, for run.json. config: the fields of its DistillConfig."""
    processes = process_count()
    unit, size = _batch_size(config)
    settings = config | {
        "processes": processes,
        f"{unit}_per_step": size * config["accumulation"] * processes,
        "base_model": model.config.name_or_path,
        "dtype": f"{model.dtype}".removeprefix("torch."),
    }
    if (quantised := getattr(model.config, "quantization_config", None)) is not None:
        settings["quantised"] = f"{quantised.quant_method}"
    return settings


def digest_records(records: Iterable[Mapping[str, Any]]) -> str:
    digest, separator = blake2b(digest_size=16), ""
    for record in records:
        digest.update(f"{separator}{json.dumps(record, sort_keys=True)}".encode())
        separator = "\n"
    return digest.hexdigest()


def _batch_size(config: Mapping[str, Any]) -> tuple[str, int]:
    """The unit of the batch size ("traces" or "tokens"), and the batch size."""
    tokens = config["tokens_per_batch"]
    return ("traces", config["batch_size"]) if tokens is None else ("tokens", tokens)


def check_same_run(folder: Path, settings: dict[str, Any]) -> None:
    """Raises ValueError if the folder holds a run with other settings, or a model, onto which transformers would load
    the adapter.

    The number of traces per optimizer step may not change; their split over batches and processes may.
    """
    check_holds_no_model(folder)
    stored = read_json(folder / RUN, {})
    if stored is None:
        return
    ignored = {"processes", "traces_per_step", "tokens_per_step"}  # checked below if the run is not finished
    ignored |= {"gradient_checkpointing", "save_steps"}  # these do not change the result
    if (folder / LOG).exists():
        ignored |= {"dtype"}  # a trained adapter can be attached to a base of any dtype
    else:
        ignored |= {"batch_size", "accumulation"}
        unit, size = _batch_size(settings)
        step, now = (of.get(f"{unit}_per_step") for of in (stored, settings))
        if step not in (None, now):  # None: the stored run counts the other unit, so tokens_per_batch differs
            raise ValueError(
                f"{folder} holds a run whose optimizer steps take {step} {unit}, now they would take {now}: batch size "
                f"{size} x accumulation {settings['accumulation']} x {settings['processes']} process(es); "
                "change one of them or choose another output folder"
            )
    optional = [name for name in _OPTIONAL if name in stored or name in settings]
    for name in [*optional, *settings]:  # report an optional setting first: it may explain other differences
        if name == "traces_digest" and stored.get(name) != settings[name]:
            raise ValueError(
                f"{folder} holds another run: its traces (or problems) are others, or in another order; use the same, "
                "choose another output folder, or remove this one"
            )
        if name not in ignored and not _is_same(name, stored.get(name), settings.get(name)):
            raise ValueError(
                f"{folder} holds another run: its {name} is {stored.get(name)!r}, now {settings.get(name)!r}; "
                "use the same value, choose another output folder, or remove this one"
            )


def _is_same(name: str, stored: Any, now: Any) -> bool:
    """Whether two values of a setting are equal. A folder may be given as `base`, `base/` or an absolute path."""
    if name in ("base_model", "teacher") and isinstance(stored, str) and isinstance(now, str):
        return Path(stored).resolve() == Path(now).resolve()
    return bool(stored == now)


def check_same_folder(out: Path, checkpoint: str | None) -> None:
    """Raises ValueError if the processes find different states in the folder. They must start at the same step, or they
    would wait for each other forever."""
    state = "a finished run" if (out / LOG).exists() else Path(checkpoint).name if checkpoint else "no checkpoint"
    everyones = sorted(set(gather_object([state])))
    if len(everyones) > 1:
        raise ValueError(
            f"{out} is not the same folder for all processes, which find {' and '.join(everyones)} in it; "
            "give every node one shared folder"
        )
