"""The sparse adapter: low-rank deltas on chosen columns of a frozen model.

`sparse_adapter` attaches and merges (`SparseAdapter`); `column_delta` runs the delta of one matrix; `first_step` sees
what only training steps show; `placement` chooses columns under a budget; `footprint` says what an adapter takes;
`column_scores` says what the gradient makes of each column; `adapter_files` reads, writes and exports.
"""
