"""One trace in each supported format, and the name of the format it is read as.

`tests/data/formats/` has one file per format, written by hand, all with the same trace.
"""

import json
from pathlib import Path
from typing import Any

SHAPES = Path(__file__).parent.parent / "data" / "formats"
QUESTION, THOUGHT = "What is 20 + 22?", "Add them: 20 + 22 = 42."
SYSTEM = "Your role is to think at length before you answer."
PLAIN: dict[str, Any] = {"problem": QUESTION, "reasoning": THOUGHT, "answer": "42"}

# How the trace differs from PLAIN, and the format that the row is read as.
GOLDEN: dict[str, tuple[dict[str, Any], str]] = {
    "native": ({"id": "7", "domain": "arithmetic"}, "native traces"),
    "s1k": ({"domain": "math", "source": "made/by_hand"}, "s1K trajectories"),
    "s1k_1_1": (
        {"domain": "math", "source": "made/by_hand", "teacher": "deepseek", "verified": True},
        "s1K trajectories",
    ),
    "limo": ({"reasoning": f"{THOUGHT}\n\n**Final Answer**\n\n\\boxed{{42}}"}, "problems with solutions"),
    "openthoughts_114k": ({"system": SYSTEM}, "OpenThoughts conversations"),
    "openthoughts_metadata": (
        {"domain": "math", "source": "made", "teacher": "deepseek"},
        "problems with deepseek_reasoning",
    ),
    "openthoughts_3": ({"domain": "math", "source": "made", "difficulty": 3}, "conversations"),
    "bespoke_stratos": (
        {"problem": f"Return your final response within \\boxed{{}}. {QUESTION}", "system": SYSTEM},
        "OpenThoughts conversations",
    ),
    "mixture_of_thoughts": ({"source": "made"}, "conversations"),
    "am_deepseek_r1": ({"source": "made"}, "conversations"),
    "messages_reasoning_content": ({}, "conversations"),
    "messages_reasoning": ({"system": SYSTEM}, "conversations"),
    "messages_thinking": ({}, "conversations"),
    "messages_think_content": ({}, "conversations"),
    "messages_think_role": ({}, "conversations"),
    "claude_blocks": ({}, "conversations"),
    "lone_closing_tag": ({}, "conversations"),
    "harmony": ({}, "conversations"),
    "messages_as_lists": ({}, "conversations"),
    "messages_as_json": ({}, "conversations"),
    "llama_nemotron": (
        {"domain": "math", "teacher": "their-model", "system": "detailed thinking on"},
        "prompts with completions",
    ),
    "numinamath_cot": ({"reasoning": f"{THOUGHT} So it is $\\boxed{{42}}$.", "source": "made"}, "conversations"),
    "gsm8k": ({}, "problems with solutions"),
    "math": ({"reasoning": f"{THOUGHT} So it is $\\boxed{{42}}$.", "domain": "Algebra"}, "problems with solutions"),
    "instruction_output": (
        {"problem": "Add the numbers.\n\n20, 22", "reasoning": f"{THOUGHT}\nThe answer is 42."},
        "prompts with completions",
    ),
    "prompt_completion": ({}, "prompts with completions"),
    "prompt_completion_turns": ({"system": SYSTEM}, "prompts with completions"),
    "openai_batch": ({"teacher": "their-model-1", "id": "r-1"}, "OpenAI batch rows"),
    "anthropic_batch": ({"teacher": "their-model", "id": "r-1", "system": SYSTEM}, "Anthropic batch rows"),
    "medical_o1": ({"answer": "The sum is 42."}, "problems with Complex_CoT"),
    "deepmath": ({"domain": "Addition", "teacher": "r1", "difficulty": 1.5}, "problems with generations"),
    "openmathreasoning": ({"domain": "has_answer_extracted", "teacher": "their-model"}, "prompts with completions"),
    "rationale": ({}, "problems with rationale"),
}


def row_of(name: str) -> Any:
    """The row of a file in SHAPES."""
    return json.loads((SHAPES / f"{name}.jsonl").read_text(encoding="utf-8"))


def conversation(*turns: tuple[str, Any]) -> dict[str, Any]:
    """A row of messages: (role, content) each."""
    return {"messages": [{"role": role, "content": content} for role, content in turns]}
