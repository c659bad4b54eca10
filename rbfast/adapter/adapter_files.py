"""The adapter's file format: writing, reading, validating and exporting deltas.

A delta changes some columns of one frozen weight [out, in]: `W[:, cols] += scale * B A`. An adapter is one delta per
matrix, saved as two files:

    adapter_config.json          the base it was made for, its matrices, and the support and rank of each
    adapter_model.safetensors    <module>.cols [s] int64, <module>.A [k, s] fp32, <module>.B [out, k] fp32

The deltas of a stack of E experts share their columns: A is [E, k, s], B [E, out, k].
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from rbfast.models.experts import experts_in
from rbfast.models.linears import Shape, dtype_name, fingerprint, matrix_shape
from rbfast.models.names import hub_id_of
from rbfast.models.weight_use import stored_weight
from rbfast.utils.files import atomic_write, resolve_target, write_text
from rbfast.utils.hub import local_copy
from rbfast.utils.records import check_numbers, from_json, to_json
from rbfast.utils.sealed import check_seal, seal

FORMAT = "rbfast-columns"
VERSION = 1
CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the ranks vLLM serves


@dataclass(frozen=True)
class Delta:
    """One delta: cols [s] int64, sorted and unique; A [k, s] and B [out, k] fp32. For E experts: A [E, k, s] and
    B [E, out, k]."""

    cols: Tensor
    A: Tensor
    B: Tensor


@dataclass(frozen=True)
class MatrixInfo:
    """One matrix in the config, or one stack of `experts` matrices. Matrices of one `group` share an input and
    therefore a support."""

    out_features: int
    in_features: int
    support: int
    rank: int
    group: int
    fingerprint: str | None
    score: float | None
    experts: int | None = None

    def __post_init__(self) -> None:
        check_numbers(self)

    @property
    def values(self) -> int:
        """The number of trained values in A and B."""
        shape = Shape(self.out_features, self.in_features, self.group, self.experts)
        return shape.values(self.rank, self.support)


@dataclass(frozen=True)
class AdapterConfig:
    """The content of adapter_config.json."""

    base_model_name_or_path: str | None
    base_dtype: str
    density: float
    scale: float
    seed: int
    placement: str
    modules: dict[str, MatrixInfo]

    def __post_init__(self) -> None:
        check_numbers(self)


def write_adapter(directory: str | Path, config: AdapterConfig, deltas: Mapping[str, Delta]) -> None:
    """Writes both files, each atomically: a failure leaves no partial file, and never the tensors of one adapter with
    the config of another.

    Raises ValueError for a delta that is not finite.
    """
    tensors = {}
    check_finite(deltas)
    for name, delta in deltas.items():
        for key in ("cols", "A", "B"):
            tensors[f"{name}.{key}"] = getattr(delta, key).detach().cpu().contiguous()
    header = {"format": FORMAT, "version": VERSION} | to_json(config)
    header["modules"] = {name: to_json(info) for name, info in config.modules.items()}
    _write_files(directory, header, tensors)


def adapter_folder(name: str | Path) -> Path:
    """The local folder of an adapter, which a hub id (owner/name) may name. Raises OSError if the hub returns none."""
    try:
        # With the prompt of its training, so that a later run without a connection does not go on with another one.
        return local_copy(name, (CONFIG_FILE, TENSOR_FILE, "prompt.json"))
    except OSError as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise OSError(
            f"{name}: expected the folder of an adapter or a hub id (owner/name); there is no such folder, and the hub "
            f"returned nothing: {reason}. Check the spelling"
        ) from error


def read_adapter(name: str | Path) -> tuple[AdapterConfig, dict[str, Delta]]:
    """Reads and validates both files of an adapter: `name` is its folder or hub id.

    Raises OSError if it is not there and ValueError, naming the first mismatch, for anything malformed.
    """
    directory = adapter_folder(name)
    config = read_config(directory / CONFIG_FILE)
    path = directory / TENSOR_FILE
    try:
        data = _read_bytes(path)
        tensors = load_tensors(data)
        check_seal(data)
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that torch lacks
        raise ValueError(f"{path}: not a complete safetensors file ({error}); save the adapter again") from error
    expected = {f"{name}.{key}" for name in config.modules for key in ("cols", "A", "B")}
    for problem, keys in (("missing", expected - tensors.keys()), ("not in the config", tensors.keys() - expected)):
        if keys:
            raise ValueError(f"{path}: tensor {min(keys)} is {problem} ({len(keys)} such); save the adapter again")
    deltas = {}
    for name, info in config.modules.items():
        delta = Delta(*(tensors[f"{name}.{key}"] for key in ("cols", "A", "B")))
        _check_delta(f"{path}: {name}", delta, info)
        deltas[name] = delta
    _check_groups(path, config, deltas)
    return config, deltas


def adapter_digest(name: str | Path) -> str:
    """A digest of both files of an adapter, named as for `read_adapter`. Raises OSError if one is missing."""
    directory = adapter_folder(name)
    data = b"".join(_read_bytes(directory / file) for file in (CONFIG_FILE, TENSOR_FILE))
    return blake2b(data, digest_size=16).hexdigest()


def check_finite(deltas: Mapping[str, Delta]) -> None:
    """Raises ValueError, naming the tensor, if a delta holds NaN or infinity."""
    for name, delta in deltas.items():
        for key in ("A", "B"):
            if not torch.isfinite(getattr(delta, key)).all():
                raise ValueError(
                    f"{name}.{key} holds NaN or infinity, so the training has diverged: go back to an earlier "
                    "checkpoint, or train with a lower learning rate"
                )


def check_whole(config: AdapterConfig, deltas: Mapping[str, Delta]) -> None:
    """Raises ValueError, naming the matrix, if a delta holds only a part of its values."""
    for name, delta in deltas.items():
        held, values = delta.A.numel() + delta.B.numel(), config.modules[name].values
        if held != values:
            raise ValueError(
                f"{name}: this process holds {held:,} of the {values:,} values of its delta; if "
                "FullyShardedDataParallel sharded them, call this within its summon_full_params(model)"
            )


def check_base(config: AdapterConfig, matrices: Mapping[str, nn.Module], where: str | Path) -> dict[str, str | None]:
    """The fingerprints of the matrices. Raises ValueError, naming the first mismatch, unless these are the matrices the
    adapter was made for."""
    base = config.base_model_name_or_path or "an unnamed model"
    for name, info in config.modules.items():
        if name not in matrices:
            raise ValueError(
                f"{where}: made for {base}, whose linear layer {name} is not in this model; load that base"
            )
        expected, shape = (info.out_features, info.in_features), matrix_shape(matrices[name])
        if shape is None:
            raise ValueError(
                f"{where}: made for {base}, whose linear layer {name} is of type {type(matrices[name]).__name__} here; "
                "load that base with the version of transformers that the adapter was trained with"
            )
        if shape != expected:
            raise ValueError(f"{where}: made for {base}, where {name} is {expected}, not {shape}; load that base")
        if info.experts != (count := experts_in(matrices[name])):
            raise ValueError(
                f"{where}: made for {base}, where {name} has {info.experts} experts, not {count}; load that base"
            )
    fingerprints = {name: fingerprint(matrices[name]) for name in config.modules}
    for name, info in config.modules.items():
        weight = stored_weight(matrices[name])
        if weight is None or info.fingerprint is None or "float16" in {config.base_dtype, dtype_name(weight)}:
            continue  # fp16 and quantised weights cannot be compared bit by bit with the base's
        if fingerprints[name] not in (info.fingerprint, None):
            raise ValueError(f"{where}: made for {base}, but the weights of {name} differ from its own; load that base")
    return fingerprints


def on_base(config: AdapterConfig, dtype: str, fingerprints: Mapping[str, str | None]) -> AdapterConfig:
    """The config of an adapter whose base is now loaded in `dtype`, which `rbfast merge` will use as well."""
    if dtype == config.base_dtype:
        return config
    modules = {name: replace(info, fingerprint=fingerprints[name]) for name, info in config.modules.items()}
    return replace(config, base_dtype=dtype, modules=modules)


def write_lora(
    directory: str | Path,
    config: AdapterConfig,
    deltas: Mapping[str, Delta],
    transposed: bool,
    base: str | None = None,
) -> None:
    """Writes the adapter as a LoRA that PEFT, vLLM and llama.cpp load: A [r, in] is zero off the support.

    The rank is padded with zeros to the next one that vLLM serves. `transposed`: the matrices are Conv1D. `base`: the
    base model to name in the file; by default the hub id of the model the adapter was trained on, if it has one.
    Raises ValueError if vLLM serves no rank that high, if a delta is not finite, or if the directory holds a model or
    an rbfast adapter, whose files have the same names.
    """
    check_finite(deltas)
    if _holds_adapter(Path(directory)):
        raise ValueError(f"{directory} holds a trained adapter, which a LoRA would replace; name another folder")
    needed = max(info.rank for info in config.modules.values())
    rank = next((rank for rank in LORA_RANKS if rank >= needed), None)
    if rank is None:
        raise ValueError(f"a LoRA may have a rank of at most {LORA_RANKS[-1]}, this adapter has {needed}; use merge()")
    stacks = [name for name, info in config.modules.items() if info.experts is not None]
    tensors = {}
    for name, delta in deltas.items():
        where = f"base_model.model.{_lora_path(name, stacks)}"
        lora_a, lora_b = _padded_factors(delta, config.modules[name], rank)
        if name in stacks:  # PEFT's layout: A [E r, in], B [out, r E], in B the experts of one rank adjacent
            lora_a, lora_b = lora_a.flatten(0, 1), lora_b.permute(1, 2, 0).flatten(1).contiguous()
        tensors[f"{where}.lora_A.weight"], tensors[f"{where}.lora_B.weight"] = lora_a, lora_b
    header = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or hub_id_of(config.base_model_name_or_path),
        "r": rank,
        "lora_alpha": rank * config.scale,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "target_modules": [name for name in config.modules if name not in stacks],
    }
    if stacks:
        header["target_parameters"] = stacks
    _write_files(directory, header, tensors)


def _padded_factors(delta: Delta, info: MatrixInfo, rank: int) -> tuple[Tensor, Tensor]:
    """A [(E,) rank, in] and B [(E,) out, rank], zero off the support and beyond the delta's own rank."""
    stack = delta.A.shape[:-2]
    lora_a = torch.zeros(*stack, rank, info.in_features, dtype=torch.float32, device="cpu")
    lora_b = torch.zeros(*stack, info.out_features, rank, dtype=torch.float32, device="cpu")
    lora_a[..., : info.rank, delta.cols.cpu()] = delta.A.detach().cpu()
    lora_b[..., : info.rank] = delta.B.detach().cpu()
    return lora_a, lora_b


def _lora_path(name: str, stacks: Sequence[str]) -> str:
    """The path of the LoRA layer that PEFT wraps around a matrix. PEFT wraps a module with several stacks once per
    stack, the first stack's layer innermost."""
    if name not in stacks:
        return name
    parent = name.rpartition(".")[0]
    outside = sum(other.rpartition(".")[0] == parent for other in stacks[stacks.index(name) + 1 :])
    return parent + ".base_layer" * outside


def _holds_adapter(directory: Path) -> bool:
    try:
        read_config(directory / CONFIG_FILE)
    except (OSError, ValueError):
        return False
    return True


def check_holds_no_model(directory: str | Path) -> None:
    """Raises ValueError if the folder holds a model: transformers would load an adapter there onto the model."""
    if (Path(directory) / "config.json").exists():
        raise ValueError(f"{directory} holds a model, which an adapter saved there would change; name another folder")


def _write_files(directory: str | Path, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    check_holds_no_model(directory)
    config = Path(directory) / CONFIG_FILE
    with atomic_write(Path(directory) / TENSOR_FILE) as file:
        file.write(seal(save_tensors(tensors, metadata={"format": "pt"})))
        file.flush()
        os.fsync(file.fileno())  # on an error until here, an older adapter stays whole
        resolve_target(config).unlink(missing_ok=True)  # an older config must not be paired with these tensors
    write_text(config, json.dumps(header, indent=1) + "\n")


def _read_bytes(path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: expected a file written by SparseAdapter.save_pretrained, found none (`distill` writes it last)"
        )
    return path.read_bytes()


def read_config(path: Path) -> AdapterConfig:
    """Reads and validates adapter_config.json alone; raises as `read_adapter` does."""
    try:
        header = json.loads(_read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); save the adapter again") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        actual = header.get("format", header.get("peft_type")) if isinstance(header, dict) else type(header).__name__
        raise ValueError(f'{path}: format: expected "{FORMAT}", got {actual!r}; this is not an rbfast adapter')
    if header.get("version") != VERSION:
        raise ValueError(f"{path}: version: expected {VERSION}, got {header.get('version')!r}; update rbfast")
    entries = header.get("modules")
    if not isinstance(entries, dict) or not entries:
        raise ValueError(f"{path}: modules: expected an object with at least one matrix, got {entries!r}")
    modules = {name: from_json(MatrixInfo, entry, f"{path}: modules: {name}") for name, entry in entries.items()}
    for name, info in modules.items():
        if not (1 <= info.support <= info.in_features and info.rank >= 1 and info.out_features >= 1):
            raise ValueError(f"{path}: modules: {name}: expected 1 <= support <= in_features and rank >= 1, got {info}")
    config = from_json(AdapterConfig, header | {"modules": modules}, str(path))
    if not (math.isfinite(config.scale) and config.scale != 0):
        raise ValueError(f"{path}: scale: expected a finite number other than 0, got {config.scale}")
    return config


def _check_delta(where: str, delta: Delta, info: MatrixInfo) -> None:
    stack = () if info.experts is None else (info.experts,)
    shapes = {
        "cols": (info.support,),
        "A": (*stack, info.rank, info.support),
        "B": (*stack, info.out_features, info.rank),
    }
    for key, shape in shapes.items():
        tensor, dtype = getattr(delta, key), torch.int64 if key == "cols" else torch.float32
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            actual = f"{tuple(tensor.shape)} {dtype_name(tensor)}"
            raise ValueError(f"{where}.{key}: expected {shape} {str(dtype).removeprefix('torch.')}, got {actual}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{where}.{key}: expected finite values, got NaN or infinity")
    if (delta.cols.diff() <= 0).any() or delta.cols[0] < 0 or int(delta.cols[-1]) >= info.in_features:
        raise ValueError(f"{where}.cols: expected sorted unique columns in 0..{info.in_features - 1}")


def _check_groups(path: Path, config: AdapterConfig, deltas: Mapping[str, Delta]) -> None:
    """Raises ValueError if matrices of one group have different columns: their input is gathered once for the group."""
    first: dict[int, str] = {}
    for name, info in config.modules.items():
        other = first.setdefault(info.group, name)
        if not torch.equal(deltas[name].cols, deltas[other].cols):
            raise ValueError(f"{path}: {name}.cols: expected the columns of {other}, which is in the same group")
