"""A merged student as a folder that others can run: its weights, its tokenizer, and the prompt it was trained with."""

import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, cached_file

from rbfast.adapter.adapter_files import CONFIG_FILE
from rbfast.data.chat_template import end_of_turn, format_prompt, write_prompt
from rbfast.data.instruction import Instruction
from rbfast.data.thinking import thinking_format
from rbfast.models.linears import non_text_linears
from rbfast.models.names import hub_id_of
from rbfast.utils.files import staged_files, write_text

README = "README.md"


def save_merged(model: Any, tokenizer: Any, folder: str | Path, instruction: Instruction) -> None:
    """Writes a plain checkpoint, `prompt.json` and a README that says how to prompt the student.

    Its generation settings stop at the end of turn that it was trained to write. On an OSError nothing is written.
    Raises ValueError if the folder holds an adapter or the base.
    """
    _stop_at(model.generation_config, end_of_turn(tokenizer))
    with _staged_checkpoint(model, tokenizer, folder) as files:
        write_prompt(files, tokenizer, instruction)
        write_text(files / README, _readme(tokenizer, instruction, str(model.config.name_or_path)))


def save_checkpoint(model: Any, tokenizer: Any, folder: str | Path) -> None:
    """Writes the weights and the tokenizer in transformers' layout, or nothing. Raises as `save_merged`."""
    with _staged_checkpoint(model, tokenizer, folder):
        pass


@contextmanager
def _staged_checkpoint(model: Any, tokenizer: Any, folder: str | Path) -> Iterator[Path]:
    """A temporary folder with the checkpoint, to add files to. Its content moves to `folder` after the block."""
    if (Path(folder) / CONFIG_FILE).exists():
        raise ValueError(f"{folder} holds an adapter, which would be loaded onto the weights too; name another folder")
    if (base := model.config.name_or_path) and Path(base).resolve() == Path(folder).resolve():
        raise ValueError(f"{folder} holds the base, which its adapters still need; name another folder")
    with staged_files(folder) as files:
        try:
            model.save_pretrained(files)
        except SafetensorError as error:  # for example on a full disk
            raise OSError(f"{folder}: the weights cannot be written: {error}") from error
        tokenizer.save_pretrained(files)
        if base and non_text_linears(model):
            _copy_processor(base, files)
        # safetensors 0.8 makes its files readable only by the owner; the other files follow the umask.
        mode = stat.S_IMODE((files / "config.json").stat().st_mode)
        for path in files.glob("model*.safetensors"):
            path.chmod(mode)
        yield files
        kept = {path.name for path in files.iterdir()}
    for old in Path(folder).glob("model*.safetensors*"):  # shards of a model that was here before
        if old.name not in kept:
            old.unlink()


def _copy_processor(base: str, files: Path) -> None:
    """Copies the processor configs of a multimodal model, without which it cannot be served."""
    for name in (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME, VIDEO_PROCESSOR_NAME):
        with suppress(OSError):  # not every such model has all of them
            if (found := cached_file(base, name)) is not None:
                shutil.copyfile(found, files / name)


def _stop_at(settings: Any, end: int) -> None:
    ends = settings.eos_token_id
    known = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if end not in known:
        settings.eos_token_id = [*known, end] if known else end


def _readme(tokenizer: Any, instruction: Instruction, base: str) -> str:
    template = thinking_format(tokenizer)
    hub_id = hub_id_of(base)
    origin = f" It was made from {hub_id}." if hub_id else ""
    lines = [
        _metadata(hub_id),
        "# A student trained with rbfast",
        f"These are the merged weights of a student that was distilled on reasoning traces.{origin}",
        "## How to prompt it",
        _prompt_section(instruction),
    ]
    if template.switches:
        switches = ", ".join(f"`{name}={value}`" for name, value in template.switches.items())
        lines.append(f"Its chat template needs {switches} (`chat_template_kwargs` of a server).")
    if template.thinks:
        lines.append(f"It thinks first. The thinking ends with `{template.close}`; the answer follows.")
    lines += [
        f"A turn ends with `{tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer))}`.",
        "The whole prompt of a problem, as in training:",
        f"```\n{format_prompt('PROBLEM', tokenizer, instruction)}\n```",
    ]
    return "\n\n".join(lines) + "\n"


def _metadata(base: str | None) -> str:
    """What the hub reads from the head of a README, as YAML."""
    entries = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [rbfast]"]
    return "\n".join(["---", *([f"base_model: {base}"] if base else []), *entries, "---"])


def _prompt_section(instruction: Instruction) -> str:
    if not instruction.text:
        return "Send the problem as it is, in one user message."
    where = "Put this after the problem, in the same message; the student does worse without it:"
    return f"{where}\n\n```\n{instruction.text}\n```"  # as code: `<answer>` would be an element of HTML
