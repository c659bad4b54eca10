"""Guides from flat keyword options."""

from dataclasses import fields
from typing import Any

from rbfast.inference.guide import Guide, Limits, Phrases

SHORT = {"wait": "Wait.", "verify": "Check.", "other": "Else.", "wrap_up": "Stop."}


def make_guide(**options: Any) -> Guide:
    """A guide whose limits, phrases and interventions are all given by name."""
    limits = {field.name: options.pop(field.name) for field in fields(Limits) if field.name in options}
    phrases = {field.name: options.pop(field.name) for field in fields(Phrases) if field.name in options}
    return Guide(Limits(**limits), Phrases(**phrases), **options)
