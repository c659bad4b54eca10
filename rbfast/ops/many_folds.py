"""column_fold_ of many matrices in one call, which costs the host one dispatch in place of hundreds.

    column_fold_all_(weights, base_columns, cols, A, B, scale, runs)      # the i-th entries belong together

All tensors share a device. Where there is no native kernel it calls the op of one matrix, whatever that runs as.
"""

from typing import Any

import torch

from rbfast.ops import registry

NAME = "column_fold_all_"
SCHEMA = (
    "(Tensor(a!)[] weights, Tensor[] base_columns, Tensor[] cols, Tensor[] A, Tensor[] B, float scale, int[] runs) "
    "-> ()"
)
_LIBRARY = torch.library.Library("rbfast", "FRAGMENT")
_LIBRARY.define(NAME + SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))


def _one_by_one(*args: Any) -> None:
    *tensors, scale, runs = args
    for *tensors_of_one, run in zip(*tensors, runs, strict=True):
        registry.column_fold_(*tensors_of_one, scale, run)


_LIBRARY.impl(NAME, _one_by_one, "CompositeExplicitAutograd")
torch.library.register_fake(f"rbfast::{NAME}", lambda *args: None, lib=_LIBRARY)

column_fold_all_ = torch.ops.rbfast.column_fold_all_.default
