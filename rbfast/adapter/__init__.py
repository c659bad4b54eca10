"""The sparse adapter: low-rank deltas on chosen columns of a frozen model.

`sparse_adapter` attaches and merges (`SparseAdapter`), if the model is `attachable`; `column_delta` runs the delta of
one matrix, with the columns that a `shared_gather` gathers; `bypass_watch` finds bypassed and idle layers during
training; `placement` chooses columns under a budget; `column_scores` scores columns by the gradient; `footprint`
computes the memory of an adapter; `adapter_files` reads, writes and exports.
"""
