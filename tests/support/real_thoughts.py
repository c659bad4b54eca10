"""Real thinking texts of four models."""

import json

from real_inputs import data_path

MODELS = (
    "r1_math500_traces/math500_deepseek_r1.jsonl",
    "r1_math500_traces/pilot_math500_qwen7b.jsonl",
    "r1_math500_traces/pilot_math500_llama8b.jsonl",
    "qwen3_think_onoff/qwen3-8b__think-on.jsonl",
)


def thoughts(name: str) -> dict[str, str]:
    with data_path(name).open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return {row["item_id"]: row.get("reasoning_trace", row.get("thinking")) for row in rows}
