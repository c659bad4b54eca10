"""The span splitter against 200 sentences of real thinking, labelled by hand before it was run on them.

`span_labels.csv` names each sentence by file, item and characters. The sentences were drawn at random, 50 from each of
four models, and labelled by one reader by the meaning of the roles (docs/spans.md).
"""

import csv
from collections import Counter
from pathlib import Path

import numpy as np
from real_thoughts import MODELS, thoughts

from rbfast.data.spans import ROLES, split_spans

LABELS = Path(__file__).with_name("span_labels.csv")


def confusion() -> Counter[tuple[str, str]]:
    """The number of sentences by (label, role of most of their characters)."""
    texts = {name: thoughts(name) for name in MODELS}
    roles = {}
    counts: Counter[tuple[str, str]] = Counter()
    with LABELS.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            key = (row["file"], row["item"])
            if key not in roles:
                spans = split_spans(texts[row["file"]][row["item"]])
                roles[key] = np.repeat([span.role for span in spans], [span.end - span.start for span in spans])
            inside = roles[key][int(row["start"]) : int(row["end"])]
            counts[row["label"], ROLES[int(np.bincount(inside, minlength=3).argmax())]] += 1
    return counts


def test_precision_and_recall_on_hand_labelled_sentences() -> None:
    counts = confusion()
    assert counts.total() == 200
    for role, precision, recall in (("strategic", 0.83, 0.65), ("tactical", 0.83, 0.92), ("answer", 1.0, 1.0)):
        hits = counts[role, role]
        marked = sum(count for (_, split), count in counts.items() if split == role)
        actual = sum(count for (label, _), count in counts.items() if label == role)
        print(f"{role}: precision {hits}/{marked} = {hits / marked:.3f}, recall {hits}/{actual} = {hits / actual:.3f}")
        assert hits >= precision * marked
        assert hits >= recall * actual
