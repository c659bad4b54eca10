"""Chat templates that imitate those of public models, and small tokenizers that carry them."""

from dataclasses import dataclass
from functools import lru_cache

from tiny_tokenizers import END, byte_level
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

_LLAMA3 = """{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>

{{ m['content'] | trim }}<|eot_id|>{% endfor %}
{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""

_GEMMA3 = """{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}
{%- set first = messages[0]['content'] + '\n\n' -%}{%- set rest = messages[1:] -%}
{%- else -%}{%- set first = '' -%}{%- set rest = messages -%}{%- endif -%}
{%- for m in rest -%}
{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('roles must alternate') }}{%- endif -%}
{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + (first if loop.first else '') }}
{{- m['content'] | trim }}{{ '<end_of_turn>\n' }}
{%- endfor -%}{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"""

_PHI3 = """{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""

_PHI4 = """{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"""

_CHATML = """{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

_STRINGS_ONLY = """{%- for m in messages %}{% set content = m.content if m.content is string else '' %}
{{- '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

# A thought is rendered only after the last question; it comes in a field, or in tags in the content.
_QWEN3 = """{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role != 'assistant' %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- else %}{% set content = m.content %}{% set thought = '' %}
{%- if m.reasoning_content is string %}{% set thought = m.reasoning_content %}
{%- elif '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1] %}
{%- set content = content.split('</think>')[-1] %}{% endif %}
{{- '<|im_start|>assistant\n' }}
{%- if loop.index0 > ns.last EMPTY %}{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
{%- else %}{{ content }}{% endif %}{{ '<|im_end|>\n' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}OPEN{% endif %}"""
_SOFT_SWITCH = (
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
)
_ON_BY_DEFAULT = _SOFT_SWITCH.replace("{% endif %}", "{% else %}{{ '<think>\\n' }}{% endif %}")
_OFF_BY_DEFAULT = (
    "{% if enable_thinking is defined and enable_thinking %}{{ '<think>\\n' }}{% else %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
)


def _qwen3(opening: str, empty: str = "") -> str:
    return _QWEN3.replace("OPEN", opening).replace("EMPTY", empty)


_R1 = """{{ bos_token }}{%- for m in messages %}{%- if m['role'] == 'system' %}{{ m['content'] }}
{%- elif m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}
{%- else %}{% set said = m['content'].split('</think>')[-1] %}{{ '<|Assistant|>' + said + '<|end_of_sentence|>' }}
{%- endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"""

_DEEPSEEK_V3 = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}
{%- elif m.role == 'assistant' %}{{ '<|Assistant|>' + m.content + '<|end_of_sentence|>' }}
{%- else %}{{ m.content }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif %}"""

_DEEPSEEK_V31 = """{%- if thinking is not defined %}{% set thinking = false %}{% endif %}
{{- bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}
{%- elif m.role == 'assistant' %}{{ '<|Assistant|></think>' + m.content.split('</think>')[-1] + '<|end_of_sentence|>' }}
{%- else %}{{ m.content }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|Assistant|>' + ('<think>' if thinking else '</think>') }}{% endif %}"""

# No token ends a turn: the header of the next turn does.
_GLM = """[gMASK]<sop>{%- for m in messages %}
{%- if m.role == 'assistant' %}{{ '<|assistant|>\n<think>' + (m.reasoning_content or '') | trim + '</think>\n' }}
{{- m.content | trim }}
{%- else %}{{ '<|' + m.role + '|>\n' + m.content }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|assistant|>
{%- if enable_thinking is defined and not enable_thinking %}{{ '\n<think></think>' }}{% endif %}{% endif %}"""

_HARMONY = """{{ '<|start|>system<|message|>You are a model.<|end|>' }}{%- for m in messages %}
{%- if m.role == 'assistant' %}{% if m.thinking and loop.last %}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}
{%- else %}{{ '<|start|>' + ('developer' if m.role == 'system' else m.role) + '<|message|>' + m.content + '<|end|>' }}
{%- endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""

# No generation prompt, and a blank before the reply.
_MISTRAL = """{{ bos_token }}{%- for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}
{%- elif m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}
{%- else %}{{ raise_exception('no system prompts') }}{% endif %}{% endfor %}"""

_MAGISTRAL = """{{ bos_token }}{%- for m in messages %}{% if m.role == 'assistant' %}
{%- if m.content is string %}{{ m.content }}{% else %}{% for block in m.content %}
{%- if block.type == 'thinking' %}{{ '[THINK]' + block.thinking + '[/THINK]' }}{% else %}{{ block.text }}{% endif %}
{%- endfor %}{% endif %}{{ eos_token }}
{%- elif m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}
{%- else %}{{ '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}{% endif %}{% endfor %}"""

_NEMOTRON = """{%- set on = true %}{{ bos_token }}{%- for m in messages %}{% set content = m.content %}
{%- if m.role == 'system' and '/no_think' in content %}{% set on = false %}{% endif %}
{%- if m.role == 'assistant' and '</think>' in content %}{% set content = content.split('</think>')[-1].lstrip() %}
{%- endif %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + content + '<|eot_id|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- if messages[0].role == 'system' and '/no_think' in messages[0].content %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}"""

# The last reply always follows the opened thought.
_NEMOTRON_NANO = """{%- for m in messages %}{% if m.role != 'assistant' %}
{{- '<SPECIAL_11>' + m.role + '\n' + m.content + '\n' }}
{%- elif loop.last %}{{ '<SPECIAL_11>Assistant\n<think>\n' + m.content.strip() + '\n<SPECIAL_12>\n' }}
{%- else %}{{ '<SPECIAL_11>Assistant\n' + m.content.split('</think>')[-1].strip() + '\n<SPECIAL_12>\n' }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<SPECIAL_11>Assistant\n<think>\n' }}{% endif %}"""

_SMOLLM3 = """{%- set mode = '/think' if enable_thinking is not defined or enable_thinking else '/no_think' %}
{{- '<|im_start|>system\nReasoning Mode: ' + mode + '\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}{{ '<|im_end|>\n' }}
{%- for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}
{%- elif m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}
{%- if mode == '/no_think' %}{{ '<think>\n\n</think>\n' }}{% endif %}{{ m.content.lstrip('\n') + '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{%- if mode == '/no_think' %}{{ '<think>\n\n</think>\n' }}{% endif %}{% endif %}"""

_GEMMA4 = """{{ bos_token }}{%- if enable_thinking | default(false) %}{{ '<|turn>system\n<|think|><turn|>\n' }}
{%- endif %}
{%- for m in messages %}{{ '<|turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}
{{- m.content.split('<channel|>')[-1] | trim }}{{ '<turn|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|turn>model\n' }}
{%- if not enable_thinking | default(false) %}{{ '<|channel>thought\n<channel|>' }}{% endif %}{% endif %}"""

_PARTS_ONLY = """{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- for part in m.content %}{% if part.type == 'text' %}{{ part.text }}
{%- endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

_WRAPPED = """{%- for m in messages %}{% if m.role == 'assistant' %}
{{- '<|bot|><think>\n' + (m.reasoning_content or '') + '\n</think>\n' }}
{{- '<answer>\n' + m.content + '\n</answer><|end_of_sentence|>' }}
{%- else %}{{ '<|' + m.role + '|>' + m.content }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|bot|>' }}{% endif %}"""


# The content must repeat tags that the prompt opens, and the template never names the closing tag.
_OLMO3 = """{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}
{{- eos_token if m.role == 'assistant' and loop.last else '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>' }}{% endif %}"""

# A reply with its own markers before the end of the turn.
_COHERE = """{{ bos_token }}{%- for m in messages %}{%- if m.role == 'user' %}
{{- '<|user|>' + m.content + '<|end_of_turn|>' }}
{%- elif m.content is string %}{{ '<|bot|><|START_RESPONSE|>' + m.content + '<|END_RESPONSE|><|end_of_turn|>' }}
{%- else %}{{ '<|bot|>' }}{% for b in m.content %}{% if b.type == 'thinking' -%}
{{ '<|START_THINKING|>' + b.thinking + '<|END_THINKING|>' }}
{%- else %}{{ '<|START_RESPONSE|>' + b.text + '<|END_RESPONSE|>' }}{% endif %}{% endfor %}{{ '<|end_of_turn|>' }}
{%- endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|bot|>' }}{% endif %}"""

# A thought in a block of its own kind; the prompt says whether to think.
_APERTUS = """{{ bos_token + '<|dev|>' + ('on' if enable_thinking else 'off') }}{% for m in messages %}
{%- if m.role == 'user' %}{{ '<|user|>' + m.content }}{% else %}{{ '<|bot|>' }}
{%- if m.content is string %}{{ m.content }}{% else %}{% for b in m.content.blocks %}
{{- '<|inner_prefix|>' + b.text + '<|inner_suffix|>' if b.type == 'thoughts' else b.text }}
{%- endfor %}{% endif %}{{ '<|eot|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|bot|>' }}{% endif %}"""

# A system prompt that mentions the tags if thinking is on; the tags themselves are dropped.
_GRANITE = """{{ '<|role|>system<|/role|>' + ('Think in <think></think>.' if thinking else 'Be kind.') + '<|eot|>' }}
{%- for m in messages %}{{ '<|role|>' + m.role + '<|/role|>' + m.content.split('</think>')[-1] + '<|eot|>' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|role|>assistant<|/role|>' }}{% endif %}"""

# A switch for thinking with an unusual name.
_OWN_SWITCH = """{%- for m in messages %}{{ '<|' + m.role + '|>' }}
{%- if deep_reasoning and m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}
{{- m.content + '<|eot|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% if deep_reasoning %}{{ '<think>' }}{% endif %}{% endif %}"""


@dataclass(frozen=True)
class Case:
    """A template, its special tokens, and the expected thinking format.

    `thought` is the message field of a thought, "tags" for its place in the content; None if the template drops it.
    """

    template: str
    kind: str
    end: str
    tokens: str = ""
    tags: str = ""  # added tokens that are not special
    thought: str | None = None
    has_bos: bool = False


_CHATML_TOKENS = "<|im_start|> <|im_end|>"
_HEADERS = "<|start_header_id|> <|end_header_id|> <|eot_id|>"
_DEEPSEEK = "<|User|> <|Assistant|> <|end_of_sentence|>"
_THINK = "<think> </think>"
CASES = {
    "llama-3": Case(_LLAMA3, "none", "<|eot_id|>", _HEADERS, has_bos=True),
    "gemma-3": Case(_GEMMA3, "none", "<end_of_turn>", "<start_of_turn> <end_of_turn>", has_bos=True),
    "phi-3": Case(_PHI3, "none", "<|end|>", "<|user|> <|assistant|> <|system|>"),
    "phi-4": Case(_PHI4, "none", "<|im_end|>", f"{_CHATML_TOKENS} <|im_sep|>"),
    "qwen2.5": Case(_CHATML, "none", "<|im_end|>", _CHATML_TOKENS),
    "qwen3": Case(_qwen3(_SOFT_SWITCH), "reply", "<|im_end|>", _CHATML_TOKENS, _THINK, "reasoning_content"),
    "qwen3-2507-instruct": Case(_STRINGS_ONLY, "none", "<|im_end|>", _CHATML_TOKENS, _THINK),
    "qwen3-2507-thinking": Case(
        _qwen3("{{ '<think>\\n' }}"), "prompt", "<|im_end|>", _CHATML_TOKENS, _THINK, "reasoning_content"
    ),
    "qwen3.5": Case(_qwen3(_ON_BY_DEFAULT), "prompt", "<|im_end|>", _CHATML_TOKENS, _THINK, "reasoning_content"),
    "qwen3.5-small": Case(_qwen3(_OFF_BY_DEFAULT), "prompt", "<|im_end|>", _CHATML_TOKENS, _THINK, "reasoning_content"),
    "r1-distill": Case(_R1, "prompt", "<|end_of_sentence|>", _DEEPSEEK, _THINK, has_bos=True),
    "deepseek-v3": Case(_DEEPSEEK_V3, "none", "<|end_of_sentence|>", _DEEPSEEK, has_bos=True),
    "deepseek-v3.1": Case(_DEEPSEEK_V31, "prompt", "<|end_of_sentence|>", _DEEPSEEK, _THINK, has_bos=True),
    "glm-4.5": Case(
        _GLM, "reply", "<|user|>", "[gMASK] <sop> <|user|> <|assistant|> <|system|>", _THINK, "reasoning_content"
    ),
    "gpt-oss": Case(
        _HARMONY, "channels", "<|return|>", "<|start|> <|end|> <|message|> <|channel|> <|return|>", "", "thinking"
    ),
    "mistral": Case(_MISTRAL, "none", END, "[INST] [/INST]", has_bos=True),
    "magistral": Case(
        _MAGISTRAL, "reply", END, "[INST] [/INST] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [THINK] [/THINK]", "", "blocks", True
    ),
    "nemotron": Case(_NEMOTRON, "reply", "<|eot_id|>", _HEADERS, has_bos=True),
    "nemotron-nano": Case(_NEMOTRON_NANO, "prompt", "<SPECIAL_12>", "<SPECIAL_11> <SPECIAL_12>", _THINK, "rest"),
    "smollm3": Case(_SMOLLM3, "reply", "<|im_end|>", _CHATML_TOKENS, _THINK, "tags"),
    "gemma-4": Case(_GEMMA4, "reply", "<turn|>", "<|turn> <turn|> <|channel> <channel|> <|think|>", has_bos=True),
    "parts-only": Case(_PARTS_ONLY, "none", "<|im_end|>", _CHATML_TOKENS),
    "wrapped": Case(
        _WRAPPED, "reply", "<|end_of_sentence|>", "<|bot|> <|user|> <|end_of_sentence|>", "", "reasoning_content"
    ),
    "olmo-3": Case(_OLMO3, "prompt", END, _CHATML_TOKENS, "", "whole"),
    "cohere": Case(
        _COHERE,
        "reply",
        "<|end_of_turn|>",
        "<|user|> <|bot|> <|START_RESPONSE|> <|END_RESPONSE|> <|end_of_turn|> <|START_THINKING|> <|END_THINKING|>",
        "",
        "blocks",
        True,
    ),
    "apertus": Case(
        _APERTUS,
        "reply",
        "<|eot|>",
        "<|dev|> <|user|> <|bot|> <|eot|>",
        "<|inner_prefix|> <|inner_suffix|>",
        "thoughts",
        True,
    ),
    "granite": Case(_GRANITE, "reply", "<|eot|>", "<|role|> <|/role|> <|eot|>"),
    "own-switch": Case(_OWN_SWITCH, "prompt", "<|eot|>", "<|user|> <|assistant|> <|eot|>", _THINK, "reasoning_content"),
}
BOS = "<|begin|>"


@lru_cache
def tokenizer_of(name: str, *texts: str, size: int = 400) -> PreTrainedTokenizerFast:
    """A small tokenizer with the template of `CASES[name]`; its eos is `END`, as if left from a base model."""
    case = CASES[name]
    tokenizer = byte_level(*texts, size=size)
    tokenizer.add_special_tokens({"bos_token": BOS, "additional_special_tokens": case.tokens.split()})
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in case.tags.split()])
    tokenizer.chat_template = case.template
    return tokenizer
