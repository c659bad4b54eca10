"""The names of the files that a run writes into its folder."""

RUN, LOG, SKIPPED, SUMMARY, DATASHEET = "run.json", "log.json", "skipped.jsonl", "summary.json", "datasheet.json"
