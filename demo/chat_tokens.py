"""The tokenizer and the chat template of the demo chat model, and conversations as its tokens."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from demo.conversations import Conversation

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
ASSISTANT = "<|assistant|>"
SPECIAL_TOKENS = [PAD, BEGIN, END, "<|system|>", "<|user|>", ASSISTANT, "<|tool|>"]
SPECIAL_TOKENS += ["<|tools|>", "<tool_call>", "</tool_call>"]
VOCABULARY = 896
CONTEXT = 4096
IGNORED = -100
"""The label that transformers' loss skips."""

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- if tools -%}
    {{- '<|tools|>' -}}
    {%- for tool in tools -%}
        {%- set function = tool['function'] -%}
        {%- set parameters = function['parameters'] or {} -%}
        {{- '\\n' ~ function['name'] ~ '(' ~ (parameters['properties'] or {}) | list | join(', ') ~ ')' -}}
    {%- endfor -%}
    {{- eos_token -}}
{%- endif -%}
{%- for message in messages -%}
    {%- set role = 'system' if message['role'] == 'developer' else message['role'] -%}
    {%- if role not in ['system', 'user', 'assistant', 'tool'] -%}
        {{- raise_exception('Unknown role: ' ~ role) -}}
    {%- endif -%}
    {#- the space lets a result have the same tokens as in the sentence that repeats it -#}
    {{- '<|' ~ role ~ '|>' ~ (' ' if role == 'tool' else '') -}}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- else -%}
        {%- for part in message['content'] or [] if part['type'] == 'text' -%}
            {{- part['text'] -}}
        {%- endfor -%}
    {%- endif -%}
    {%- for call in message['tool_calls'] or [] -%}
        {%- set function = call['function'] -%}
        {{- '<tool_call>{"name": ' ~ function['name'] | tojson ~ ', "arguments": ' -}}
        {{- function['arguments'] if function['arguments'] is string else function['arguments'] | tojson -}}
        {{- '}</tool_call>' -}}
    {%- endfor -%}
    {{- eos_token -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>' -}}
{%- endif -%}
"""


def make_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer. All 256 bytes are in its vocabulary, so it can encode any text."""
    tokenizer = Tokenizer(models.BPE())
    # each digit is a token of its own, also the space before it: the model copies numbers digit by digit
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=SPECIAL_TOKENS[3:],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def encode(
    conversation: Conversation, tokenizer: PreTrainedTokenizerFast, whole: bool
) -> tuple[list[int], list[int]]:
    """Return token ids and labels of a conversation, equally long.

    Only what the assistant says has labels, or the `whole` conversation. It is rendered by the chat template,
    so that training and serving can't differ.
    """
    text = tokenizer.apply_chat_template(
        conversation.messages, tools=conversation.tools or None, tokenize=False
    )
    ids = tokenizer.encode(text, add_special_tokens=False)
    assistant, end = tokenizer.convert_tokens_to_ids([ASSISTANT, END])
    labels = []
    speaks = False
    for token in ids:
        labels.append(token if speaks or whole else IGNORED)
        speaks = token == assistant or (speaks and token != end)
    return ids, labels
