"""Training an adapter on traces: `distill` in one call, its settings (`distill_config`) and `examples`, the `trainer`
with its `objective`, `checkpoints`, `resume`, `sharding`, held-out traces (`held_out`), memory estimates (`plan`), and
the merged model (`merged_model`).
"""
