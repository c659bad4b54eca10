"""Tiny random students on disk with a chat template of `thinking_templates`."""

from pathlib import Path

from thinking_templates import tokenizer_of
from tiny import tiny_model_for


def save_student(folder: Path, template: str, *texts: str) -> Path:
    """A student with this template, whose settings name only the base's own end of turn."""
    tokenizer = tokenizer_of(template, *texts)
    tiny_model_for(tokenizer, bos_token_id=tokenizer.bos_token_id).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
