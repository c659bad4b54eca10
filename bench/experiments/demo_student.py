"""The demo's student with the adapter of a run, and the demo's held-out problems."""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rbfast.adapter.sparse_adapter import SparseAdapter
from rbfast.demo.run import FAMILIES, HELD_OUT, TRAIN
from rbfast.demo.worked_families import split
from rbfast.grading.grade import Problem
from rbfast.models.student import SMOLLM2, load_student


def load_trained(run: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, SparseAdapter]:
    """The student, its tokenizer, and the adapter in the folder of a demo's run, attached."""
    model, tokenizer = load_student(SMOLLM2)
    return model, tokenizer, SparseAdapter.from_pretrained(model, run)


def held_out_problems(most: int) -> list[Problem]:
    """The first held-out problems of each family of the demo with seed 0, at most `most` of each."""
    splits = [split(name, train=TRAIN, held_out=HELD_OUT, seed=0)[1] for name in FAMILIES]
    return [problem for family in splits for problem in family[:most]]
