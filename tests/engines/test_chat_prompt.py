"""From a job to a request: chat template, limits, and the defaults of the sampling parameters."""

import inspect
import threading
from typing import Any

import pytest
from transformers import GenerationConfig, LlamaConfig

from protocol.errors import Cancelled, ContextLengthExceeded, InvalidRequest
from protocol.jobs import ChatJob, SamplingParams
from tests.engines.tiny_chat import VOCABULARY, make_tokenizer
from workers.engines.chat.prompt import RESERVED_TEMPLATE_NAMES, PromptBuilder
from workers.engines.chat.sequence import Request, Sampling

TOKENIZER = make_tokenizer()
EOS = TOKENIZER.eos_token_id
CONTEXT = 64
HELLO = ({"role": "user", "content": "hello"},)


def builder(template: str | None = None, generation: Any = None, context: int = CONTEXT) -> PromptBuilder:
    tokenizer = make_tokenizer() if template is not None else TOKENIZER
    if template is not None:
        tokenizer.chat_template = template
    return PromptBuilder(tokenizer, generation or GenerationConfig(), VOCABULARY, context)


def job(*messages: dict[str, Any], **fields: Any) -> ChatJob:
    sampling = fields.pop("sampling", SamplingParams())
    return ChatJob(id="r", model="tiny", messages=list(messages or HELLO), sampling=sampling, **fields)


def text_of(request: Request) -> str:
    return TOKENIZER.decode(request.prompt)


def sampling_of(generation: Any = None, **params: Any) -> Sampling:
    return builder(generation=generation).build(job(sampling=SamplingParams(**params))).sampling


def test_the_prompt_is_what_the_template_makes_of_the_messages():
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    request = builder().build(job(*messages, sampling=SamplingParams(n=3)))
    assert text_of(request) == "<|system|>be brief<|end|><|user|>hello<|end|><|assistant|>"
    assert request.id == "r"
    assert [sequence.index for sequence in request.sequences] == [0, 1, 2]


def test_continue_final_message_ends_the_prompt_with_that_message():
    messages = [*HELLO, {"role": "assistant", "content": "The answer is"}]
    request = builder().build(job(*messages, continue_final_message=True))
    assert text_of(request) == "<|user|>hello<|end|><|assistant|>The answer is"


def test_a_final_message_that_the_template_drops_cannot_be_continued():
    dropping = builder("{%- for message in messages[:-1] -%}{{- message['content'] -}}{%- endfor -%}")
    messages = [*HELLO, {"role": "assistant", "content": "secret"}]
    with pytest.raises(InvalidRequest, match="can't be applied") as caught:
        dropping.build(job(*messages, continue_final_message=True))
    assert caught.value.param == "messages"
    assert "secret" not in caught.value.message


def test_what_the_template_rejects_is_the_clients_error_in_the_templates_words():
    with pytest.raises(InvalidRequest, match="Unknown role: bad") as caught:
        builder().build(job({"role": "bad", "content": "secret"}))
    assert caught.value.param == "messages"
    assert "secret" not in caught.value.message


def test_an_error_inside_the_template_is_named_without_its_text():
    with pytest.raises(InvalidRequest, match=r"\(TypeError\)") as caught:
        builder("{{ messages[0]['content'] + 1 }}").build(job())
    assert caught.value.param == "messages"
    assert "str" not in caught.value.message


def test_messages_that_give_no_token_are_refused():
    with pytest.raises(InvalidRequest, match="empty prompt") as caught:
        builder("{{ '' }}").build(job())
    assert caught.value.param == "messages"


def test_the_context_must_hold_the_prompt_and_one_token():
    length = len(builder().build(job()).prompt)
    with pytest.raises(ContextLengthExceeded) as caught:
        builder(context=length).build(job())
    assert caught.value.param == "messages"
    assert caught.value.message == (
        f"This model's maximum context length is {length} tokens. However, your messages resulted in"
        f" {length} tokens. Please reduce the length of the messages."
    )
    assert builder(context=length + 1).build(job()).sampling.max_tokens == 1


def test_max_tokens_and_min_tokens_are_limited_by_the_room_that_the_prompt_leaves():
    sampling = SamplingParams(max_tokens=1000, min_tokens=500)
    request = builder().build(job(sampling=sampling))
    room = CONTEXT - len(request.prompt)
    assert (request.sampling.max_tokens, request.sampling.min_tokens) == (room, room)
    assert sampling_of(max_tokens=7, min_tokens=3).min_tokens == 3


@pytest.mark.parametrize("name", sorted(RESERVED_TEMPLATE_NAMES))
def test_template_arguments_that_belong_to_the_service_are_refused(name):
    with pytest.raises(InvalidRequest, match=f"can't set {name}") as caught:
        builder().build(job(chat_template_kwargs={name: True}))
    assert caught.value.param == "chat_template_kwargs"


def test_every_argument_of_transformers_is_reserved_or_meant_for_the_template():
    arguments = set(inspect.signature(TOKENIZER.apply_chat_template).parameters)
    assert arguments - RESERVED_TEMPLATE_NAMES == {"tools", "documents", "kwargs"}


def test_other_template_arguments_reach_the_template():
    request = builder().build(job(chat_template_kwargs={"prefix": "xyz"}))
    assert text_of(request).endswith("<|assistant|>xyz")


def test_calls_and_reasoning_of_earlier_answers_reach_the_template():
    template = (
        "{%- for m in messages -%}{{ m.reasoning_content or '' }}"
        "{%- for call in m.tool_calls or [] -%}{{ call.function.name }} {{ call.function.arguments.city }}"
        "{%- endfor -%}{{ m.tool_call_id or '' }}{{ m.content }};{%- endfor -%}"
    )
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    answer = {"role": "assistant", "content": "", "reasoning_content": "Look. ", "tool_calls": [call]}
    result = {"role": "tool", "content": " sunny", "tool_call_id": "c1"}
    request = builder(template).build(job(*HELLO, answer, result))
    assert text_of(request) == "hello;Look. weather Rome;c1 sunny;"


PARAMETERS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty"]
NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
CONFIGURED = {"temperature": 0.7, "top_p": 0.8, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2}
REQUESTED = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_parameter_is_the_requests_then_the_generation_configs_then_neutral(name):
    configured = GenerationConfig(do_sample=True, **CONFIGURED)
    assert getattr(sampling_of(), name) == NEUTRAL[name]
    assert getattr(sampling_of(configured), name) == CONFIGURED[name]
    assert getattr(sampling_of(configured, **{name: REQUESTED[name]}), name) == REQUESTED[name]


def test_a_generation_config_that_does_not_sample_makes_a_request_greedy():
    greedy = GenerationConfig(do_sample=False)
    assert sampling_of(greedy).greedy
    assert sampling_of(GenerationConfig(do_sample=False, temperature=0.7)).greedy
    assert not sampling_of(greedy, temperature=0.5).greedy


def test_a_request_without_a_seed_gets_one_of_its_own():
    assert sampling_of(seed=0).seed == 0
    assert sampling_of().seed != sampling_of().seed


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        pytest.param(GenerationConfig(), {EOS}, id="tokenizer"),
        pytest.param(GenerationConfig(eos_token_id=7), {7, EOS}, id="one"),
        pytest.param(GenerationConfig(eos_token_id=[7, 9]), {7, 9, EOS}, id="several"),
    ],
)
def test_end_tokens_are_the_generation_configs_and_the_tokenizers(generation, expected):
    assert sampling_of(generation).stop_token_ids == expected
    assert sampling_of(generation, stop_token_ids=(3,)).stop_token_ids == expected | {3}
    assert sampling_of(generation, stop_token_ids=(3,), ignore_eos=True).stop_token_ids == {3}


def test_the_end_token_of_the_config_counts_if_it_is_a_special_token():
    system = TOKENIZER.convert_tokens_to_ids("<|system|>")
    for token, expected in ((system, {EOS, system}), (300, {EOS})):
        config = LlamaConfig(vocab_size=VOCABULARY, eos_token_id=token)
        made = PromptBuilder(TOKENIZER, GenerationConfig(), VOCABULARY, CONTEXT, config=config)
        assert made.build(job()).sampling.stop_token_ids == expected


def test_what_the_template_writes_after_an_answer_ends_it():
    template = "{% for m in messages %}{{ m['content'] }}<|user|>\n{% endfor %}"
    user = TOKENIZER.convert_tokens_to_ids("<|user|>")
    assert builder(template).build(job()).sampling.stop_token_ids == {EOS, user}
    ordinary = "{% for m in messages %}{{ m['content'] }} the end{% endfor %}"
    assert builder(ordinary).build(job()).sampling.stop_token_ids == {EOS}


class CountingTokenizer:
    """Counts what is encoded; everything else is the tokenizer's own."""

    def __init__(self) -> None:
        self._tokenizer = make_tokenizer()
        self.encoded = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._tokenizer(*args, **kwargs)

    @property
    def backend_tokenizer(self) -> Any:
        return self

    def encode_batch_fast(self, texts: list[str], **kwargs: Any) -> Any:
        self.encoded += len(texts)
        return self._tokenizer.backend_tokenizer.encode_batch_fast(texts, **kwargs)

    @property
    def normalizer(self) -> Any:
        return self._tokenizer.backend_tokenizer.normalizer

    @property
    def pre_tokenizer(self) -> Any:
        return self._tokenizer.backend_tokenizer.pre_tokenizer

    @property
    def model(self) -> Any:
        return self._tokenizer.backend_tokenizer.model

    def no_truncation(self) -> None: ...

    def no_padding(self) -> None: ...

    def to_str(self) -> str:
        return self._tokenizer.backend_tokenizer.to_str()


@pytest.mark.parametrize("template", [None, "{{ 'x' * 8000000 }}"], ids=["messages", "template"])
def test_text_that_cannot_fit_is_refused_before_it_is_encoded(template):
    tokenizer = CountingTokenizer()
    made = PromptBuilder(tokenizer, GenerationConfig(), VOCABULARY, CONTEXT)
    if template is not None:
        tokenizer._tokenizer.chat_template = template
    content = "hi" if template else "x" * 8_000_000
    with pytest.raises(ContextLengthExceeded, match="resulted in at least "):
        made.build(job({"role": "user", "content": content}))
    assert tokenizer.encoded == 0


def test_what_the_template_leaves_out_does_not_count():
    short = builder("{{ messages[-1]['content'] }}")
    messages = [{"role": "assistant", "content": "x" * 8_000_000}, {"role": "user", "content": "hello"}]
    assert text_of(short.build(job(*messages))) == "hello"


@pytest.mark.parametrize("place", ["name", "template argument", "many messages"])
def test_everything_that_the_template_writes_counts(place):
    tokenizer = CountingTokenizer()
    tokenizer._tokenizer.chat_template = "{%- for message in messages -%}{{ message.name or '' }}{{ message.content }}{%- endfor -%}{{ prefix }}"
    made, long = PromptBuilder(tokenizer, GenerationConfig(), VOCABULARY, CONTEXT), "x" * 8_000_000
    jobs = {
        "name": job({"role": "user", "content": "hi", "name": long}),
        "template argument": job(chat_template_kwargs={"prefix": ["hi", {"text": long}]}),
        "many messages": job(*({"role": "user", "content": "x" * 1000} for _ in range(4096))),
    }
    with pytest.raises(ContextLengthExceeded, match="resulted in at least "):
        made.build(jobs[place])
    assert tokenizer.encoded == 0


def test_a_request_that_is_cancelled_already_is_not_encoded():
    tokenizer = CountingTokenizer()
    made = PromptBuilder(tokenizer, GenerationConfig(), VOCABULARY, CONTEXT)
    with pytest.raises(Cancelled):
        made.build(job(), lambda: True)
    assert tokenizer.encoded == 0
    made.build(job())
    assert tokenizer.encoded == 1


@pytest.mark.slow
def test_other_threads_run_while_a_long_prompt_is_encoded():
    made, encoding, count = builder(context=1 << 22), threading.Event(), 0

    def encode() -> None:
        encoding.set()
        made._encoder.encode("the quick brown fox " * 100_000)

    long = threading.Thread(target=encode)
    long.start()
    encoding.wait()
    while long.is_alive():
        made.build(job())
        count += 1
    # before the encoding takes the interpreter's lock, and after it, some are built in any case
    assert count > 1000, "the long prompt held up the short ones"


def test_a_token_beyond_the_models_embedding_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<added>"])
    rows = tokenizer.convert_tokens_to_ids("<added>")
    made = PromptBuilder(tokenizer, GenerationConfig(), rows, CONTEXT)
    with pytest.raises(InvalidRequest, match=f"contain token {rows}; .* 0 to {rows - 1}") as caught:
        made.build(job({"role": "user", "content": "a <added>"}))
    assert caught.value.param == "messages"


def test_a_model_without_end_tokens_stops_at_the_requests_own():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    made = PromptBuilder(tokenizer, GenerationConfig(), VOCABULARY, CONTEXT)
    assert made.build(job()).sampling.stop_token_ids == frozenset()


def test_stop_tokens_that_the_model_does_not_have_are_ignored():
    given = (-1, 0, VOCABULARY - 1, VOCABULARY)
    assert sampling_of(stop_token_ids=given, ignore_eos=True).stop_token_ids == {0, VOCABULARY - 1}


@pytest.mark.parametrize("token", [-1, VOCABULARY])
def test_a_bias_for_a_token_that_the_model_does_not_have_is_refused(token):
    with pytest.raises(InvalidRequest, match=f"token {token}; .* 0 to {VOCABULARY - 1}") as caught:
        sampling_of(logit_bias={3: 1.0, token: 1.0})
    assert caught.value.param == "logit_bias"


def test_biases_for_the_first_and_the_last_token_are_accepted():
    bias = {0: -1.0, VOCABULARY - 1: 1.0}
    assert dict(sampling_of(logit_bias=bias).logit_bias) == bias
