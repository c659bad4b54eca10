"""Tiny random students on disk that carry a chat template of `thinking_templates`."""

from pathlib import Path

from thinking_templates import tokenizer_of
from tiny import model_of_words


def save_student(folder: Path, template: str, *texts: str) -> Path:
    """A student with this template, whose settings name no end of turn but the base's own."""
    tokenizer = tokenizer_of(template, *texts)
    model_of_words(tokenizer, bos_token_id=tokenizer.bos_token_id).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
