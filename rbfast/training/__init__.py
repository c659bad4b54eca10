"""Traces into an adapter: `distill` in one call, the `trainer` with its `objective`, `checkpoints`, `sharding`, and
the files of a run (`run_folder`).
"""
