"""Reason1K: a few good traces from a large pool, with a reason for each trace that is left out.

`curate` runs the stages: clean, decontaminate, dedup, score, select. `datasheet` reports on them. `text` holds the
loops over many texts. The entry points for other packages are `curate` and `read_pass_rates`.
"""
