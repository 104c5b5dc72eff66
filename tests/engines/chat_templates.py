"""Small chat templates that write turns, reasoning and calls as those of well-known families do."""

_IM = (
    "{%- macro turn(role, text) -%}<|im_start|>{{ role }}\n{{ text }}<|im_end|>\n{%- endmacro -%}"
    "{%- if tools -%}{{ turn('system', 'Tools: ' ~ tools | tojson) }}{%- endif -%}"
)

QWEN3 = (
    _IM
    + """{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{{- '<|im_start|>assistant\n' -}}
{%- if loop.last or m.reasoning_content -%}
{{- '<think>\n' ~ (m.reasoning_content or '') ~ '\n</think>\n\n' -}}
{%- endif -%}
{{- m.content -}}
{%- for call in m.tool_calls or [] -%}
{%- if m.content or not loop.first -%}{{ '\n' }}{%- endif -%}
{{- '<tool_call>\n{"name": "' ~ call.function.name ~ '", "arguments": ' ~ call.function.arguments | tojson ~ '}\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\n' -}}
{%- else -%}
{{- turn(m.role, m.content) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\n' -}}
{%- if enable_thinking is defined and not enable_thinking -%}{{ '<think>\n\n</think>\n\n' }}{%- endif -%}
{%- endif -%}"""
)

QWEN3_THINKING = QWEN3.replace(
    "{%- if enable_thinking is defined and not enable_thinking -%}{{ '<think>\n\n</think>\n\n' }}{%- endif -%}",
    "{{- '<think>\n' -}}",
)
"""The prompt ends with the opening tag."""

HERMES = (
    _IM
    + """{%- for m in messages -%}
{%- if m.tool_calls -%}
<|im_start|>assistant
{%- for call in m.tool_calls -%}
{{- '\n<tool_call>\n{"name": "' ~ call.function.name ~ '", "arguments": ' ~ call.function.arguments | tojson ~ '}\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\n' -}}
{%- else -%}
{{- turn(m.role, m.content) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""
)

LLAMA_3_1 = """<|begin_of_text|>
{%- if tools -%}<|start_header_id|>system<|end_header_id|>

{{ tools | tojson(indent=4) }}<|eot_id|>{%- endif -%}
{%- for m in messages -%}
{%- if m.tool_calls -%}
{%- if m.tool_calls | length != 1 -%}{{ raise_exception('This model only supports single tool-calls at once!') }}{%- endif -%}
{%- set call = m.tool_calls[0].function -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' ~ call.name ~ '", "parameters": ' ~ call.arguments | tojson ~ '}<|eot_id|>' -}}
{%- else -%}
{{- '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\n\n' ~ m.content | trim ~ '<|eot_id|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif -%}"""

MISTRAL_NEMO = """<s>
{%- for m in messages -%}
{%- if m.role == 'user' -%}
{%- if tools and loop.last -%}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{%- endif -%}
[INST]{{ m.content }}[/INST]
{%- elif m.tool_calls -%}
[TOOL_CALLS][
{%- for call in m.tool_calls -%}
{%- if call.id | length != 9 -%}{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{%- endif -%}
{{- '{"name": "' ~ call.function.name ~ '", "arguments": ' ~ call.function.arguments | tojson ~ ', "id": "' ~ call.id ~ '"}' -}}
{%- if not loop.last -%}{{ ', ' }}{%- endif -%}
{%- endfor -%}]</s>
{%- elif m.role == 'assistant' -%}
{{ m.content }}</s>
{%- else -%}
[TOOL_RESULTS]{{ {'content': m.content, 'call_id': m.tool_call_id} | tojson }}[/TOOL_RESULTS]
{%- endif -%}
{%- endfor -%}"""

MISTRAL_SMALL = """<s>
{%- for m in messages -%}
{%- if m.role == 'user' -%}[INST]{{ m.content }}[/INST]
{%- elif m.tool_calls -%}
{%- for call in m.tool_calls -%}
[TOOL_CALLS]{{ call.function.name }}[CALL_ID]{{ call.id }}[ARGS]{{ call.function.arguments | tojson }}
{%- endfor -%}</s>
{%- elif m.role == 'assistant' -%}{{ m.content }}</s>
{%- else -%}[TOOL_RESULTS]{{ m.tool_call_id }}[TOOL_CONTENT]{{ m.content }}[/TOOL_RESULTS]
{%- endif -%}
{%- endfor -%}"""

MAGISTRAL = """<s>
{%- for m in messages -%}
{%- if m.role == 'user' -%}[INST]{{ m.content }}[/INST]
{%- else -%}{{ '[THINK]' ~ m.thinking ~ '[/THINK]' if m.thinking else '' }}{{ m.content }}</s>
{%- endif -%}
{%- endfor -%}"""

GPT_OSS = """
{%- if tools -%}<|start|>developer<|message|>{{ tools | tojson }}<|end|>{%- endif -%}
{%- if reasoning_effort -%}<|start|>system<|message|>Reasoning: {{ reasoning_effort }}<|end|>{%- endif -%}
{%- for m in messages -%}
{%- if m.role != 'assistant' -%}
<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>
{%- elif m.tool_calls -%}
{%- if m.content and m.thinking -%}{{ raise_exception('Cannot pass both content and thinking in a message with tool calls!') }}{%- endif -%}
{%- if m.content or m.thinking -%}<|start|>assistant<|channel|>analysis<|message|>{{ m.content or m.thinking }}<|end|>{%- endif -%}
{%- set call = m.tool_calls[0].function -%}
<|start|>assistant to=functions.{{ call.name }}<|channel|>commentary json<|message|>{{ call.arguments | tojson }}<|call|>
{%- else -%}
{%- if 'thinking' in m -%}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{%- endif -%}
<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|return|>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}"""

DEEPSEEK_R1 = """<｜begin▁of▁sentence｜>
{%- for m in messages -%}
{%- if m.role == 'user' -%}<｜User｜>{{ m.content }}
{%- elif m.tool_calls -%}
{{- '<｜Assistant｜><｜tool▁calls▁begin｜>' -}}
{%- for call in m.tool_calls -%}
{%- if not loop.first -%}{{ '\n' }}{%- endif -%}
{{- '<｜tool▁call▁begin｜>' ~ call.type ~ '<｜tool▁sep｜>' ~ call.function.name ~ '\n```json\n' + call.function.arguments ~ '\n```<｜tool▁call▁end｜>' -}}
{%- endfor -%}
{{- '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' -}}
{%- elif m.role == 'assistant' -%}
<｜Assistant｜>{{ m.content.split('</think>')[-1] }}<｜end▁of▁sentence｜>
{%- else -%}
<｜tool▁outputs▁begin｜>{{ m.content }}<｜tool▁outputs▁end｜>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<｜Assistant｜><think>\n' }}{%- endif -%}"""
"""Arguments are text here; reasoning is cut off and never written."""

DEEPSEEK_V3_1 = """<｜begin▁of▁sentence｜>
{%- for m in messages -%}
{%- if m.role == 'user' -%}<｜User｜>{{ m.content }}
{%- elif m.tool_calls -%}
<｜Assistant｜></think>{{ m.content }}<｜tool▁calls▁begin｜>
{%- for call in m.tool_calls -%}
<｜tool▁call▁begin｜>{{ call.function.name }}<｜tool▁sep｜>{{ call.function.arguments | tojson }}<｜tool▁call▁end｜>
{%- endfor -%}
<｜tool▁calls▁end｜><｜end▁of▁sentence｜>
{%- elif m.role == 'assistant' -%}
<｜Assistant｜></think>{{ m.content }}<｜end▁of▁sentence｜>
{%- else -%}
<｜tool▁output▁begin｜>{{ m.content }}<｜tool▁output▁end｜>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<｜Assistant｜>' ~ ('<think>' if thinking else '</think>') }}{%- endif -%}"""

KIMI_K2 = """
{%- if tools -%}<|im_system|>tool_declare<|im_middle|>{{ tools | tojson }}<|im_end|>{%- endif -%}
{%- for m in messages -%}
<|im_{{ m.role }}|>{{ m.role }}<|im_middle|>
{%- if m.role == 'tool' -%}## Return of {{ m.tool_call_id }}
{% endif -%}
{{ m.content }}
{%- if m.tool_calls -%}
<|tool_calls_section_begin|>
{%- for call in m.tool_calls -%}
<|tool_call_begin|>functions.{{ call.function.name }}:{{ loop.index0 }}<|tool_call_argument_begin|>{{ call.function.arguments | tojson }}<|tool_call_end|>
{%- endfor -%}
<|tool_calls_section_end|>
{%- endif -%}
<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}"""

GLM_4_5 = """[gMASK]<sop>
{%- if tools -%}<|system|>
{{ tools | tojson }}{%- endif -%}
{%- for m in messages -%}
<|{{ m.role }}|>
{%- if m.role == 'assistant' -%}
{{- '\n<think>' ~ (m.reasoning_content or '') ~ '</think>' -}}
{%- endif -%}
{{- '\n' ~ m.content if m.content else '' -}}
{%- for call in m.tool_calls or [] -%}
{{- '\n<tool_call>' ~ call.function.name ~ '\n' -}}
{%- for key, value in call.function.arguments.items() -%}
<arg_key>{{ key }}</arg_key>
<arg_value>{{ value if value is string else value | tojson }}</arg_value>
{% endfor -%}
</tool_call>
{%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"""

QWEN3_CODER = (
    _IM
    + """{%- for m in messages -%}
{%- if m.tool_calls -%}
{{- '<|im_start|>assistant\n' ~ m.content -}}
{%- for call in m.tool_calls -%}
{{- '<tool_call>\n<function=' ~ call.function.name ~ '>\n' -}}
{%- for key, value in call.function.arguments.items() -%}
{{- '<parameter=' ~ key ~ '>\n' ~ (value if value is string else value | tojson) ~ '\n</parameter>\n' -}}
{%- endfor -%}
{{- '</function>\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\n' -}}
{%- else -%}
{{- turn(m.role, m.content) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""
)

MINIMAX_M2 = """{%- if tools -%}]~!b[]~b]system
{{ tools | tojson }}[e~[
{% endif -%}
{%- for m in messages -%}
]~b]{{ m.role }}
{{ '<think>\n' ~ m.reasoning_content ~ '\n</think>\n\n' if m.reasoning_content else '' }}{{ m.content }}
{%- if m.tool_calls -%}
{{- '\n<minimax:tool_call>\n' -}}
{%- for call in m.tool_calls -%}
{{- '<invoke name="' ~ call.function.name ~ '">\n' -}}
{%- for key, value in call.function.arguments.items() -%}
{{- '<parameter name="' ~ key ~ '">' ~ (value if value is string else value | tojson) ~ '</parameter>\n' -}}
{%- endfor -%}
{{- '</invoke>\n' -}}
{%- endfor -%}
</minimax:tool_call>
{%- endif -%}
[e~[
{% endfor -%}
{%- if add_generation_prompt -%}{{ ']~b]ai\n<think>\n' }}{%- endif -%}"""

GEMMA_4 = """<bos>
{%- if tools -%}<|turn>system
{{ tools | tojson }}<turn|>
{% endif -%}
{%- for m in messages -%}
<|turn>{{ 'model' if m.role == 'assistant' else m.role }}
{{ '<|channel>thought\n' ~ m.reasoning ~ '\n<channel|>' if m.reasoning else '' }}
{%- for call in m.tool_calls or [] -%}
{{- '<|tool_call>call:' ~ call.function.name ~ '{' -}}
{%- for key, value in call.function.arguments.items() -%}
{{- key ~ ':' ~ ('<|"|>' ~ value ~ '<|"|>' if value is string else value | tojson) -}}
{%- if not loop.last -%},{%- endif -%}
{%- endfor -%}
{{- '}<tool_call|>' -}}
{%- endfor -%}
{{ m.content }}<turn|>
{% endfor -%}
{%- if add_generation_prompt -%}{{ '<|turn>model\n' }}{%- endif -%}"""

COMMAND_R7B = """<BOS_TOKEN>
{%- for m in messages -%}
{%- if m.role == 'user' -%}<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{{ m.content }}<|END_OF_TURN_TOKEN|>
{%- else -%}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>
{%- if m.tool_calls -%}
{{- '<|START_THINKING|>' ~ (m.reasoning_content or '') ~ '<|END_THINKING|><|START_ACTION|>[\n' -}}
{%- for call in m.tool_calls -%}
{{- '    {"tool_call_id": "' ~ loop.index0 ~ '", "tool_name": "' ~ call.function.name ~ '", "parameters": ' ~ call.function.arguments | tojson ~ '}' -}}
{%- if not loop.last -%}{{ ',\n' }}{%- endif -%}
{%- endfor -%}
{{- '\n]<|END_ACTION|>' -}}
{%- else -%}
<|START_RESPONSE|>{{ m.content }}<|END_RESPONSE|>
{%- endif -%}<|END_OF_TURN_TOKEN|>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{%- endif -%}"""

GEMMA_3 = """<bos>
{%- for m in messages -%}
<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}
{{ m.content | trim }}<end_of_turn>
{% endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"""
"""Knows neither tools nor reasoning."""
