"""The sparse adapter: low-rank deltas on chosen columns of a frozen model.

`sparse_adapter` attaches and merges (`SparseAdapter`); `column_delta` runs the delta of one matrix; `bypass_watch`
finds bypassed and idle layers during training; `placement` chooses columns under a budget; `column_scores` scores
columns by the gradient; `footprint` computes the memory of an adapter; `adapter_files` reads, writes and exports.
"""
