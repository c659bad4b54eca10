"""Reason1K: a few good traces from a large pool, with a reason for each trace that is left out.

`curate` runs the stages: clean, decontaminate, dedup, score, select; `datasheet` shows what happened. `text` has the
loops over many texts. Others import `curate` and `read_pass_rates`.
"""
