"""The native ops: schemas and kernels (registry), gradients (autograd), their definition in plain torch (reference),
and the head's products on a GPU (head_gemm).

    from rbfast import ops
    ops.column_gather(x, cols); ops.implementations("cuda")

By the device of its tensors, an op runs native code if there is any, else Triton, else the reference.
"""

from rbfast.ops.autograd import (
    column_side,
    column_tap,
    column_tap_into,
    column_tap_shared,
    first_order,
    is_spent,
)
from rbfast.ops.registry import (
    column_fold_,
    column_fold_all_,
    column_gather,
    column_grad,
    column_grad_all,
    column_linear_,
    column_scatter_,
    cpu_isa,
    cpu_isa_reason,
    divergence_rows_,
    filter_helps,
    grouped_column_fold_,
    grouped_column_grad,
    grouped_column_linear_,
    grouped_column_scatter_,
    grouped_linear,
    head_backward_,
    head_forward_,
    head_grad_,
    implementations,
    row_thresholds,
    run_of,
    scaled_,
    uses_tiles,
    uses_torch_products,
)

__all__ = [
    "column_fold_",
    "column_fold_all_",
    "column_gather",
    "column_grad",
    "column_grad_all",
    "column_linear_",
    "column_scatter_",
    "column_side",
    "column_tap",
    "column_tap_into",
    "column_tap_shared",
    "cpu_isa",
    "cpu_isa_reason",
    "divergence_rows_",
    "filter_helps",
    "first_order",
    "grouped_column_fold_",
    "grouped_column_grad",
    "grouped_column_linear_",
    "grouped_column_scatter_",
    "grouped_linear",
    "head_backward_",
    "head_forward_",
    "head_grad_",
    "implementations",
    "is_spent",
    "row_thresholds",
    "run_of",
    "scaled_",
    "uses_tiles",
    "uses_torch_products",
]
