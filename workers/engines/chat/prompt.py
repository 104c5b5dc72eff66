"""Turns a job into a request: chat template, tokens, sampling parameters with defaults filled in.

Runs in the thread that submits, never in the engine thread.
"""

import random
import threading
from typing import Any

from jinja2 import TemplateError

from protocol.errors import ContextLengthExceeded, InvalidRequest
from protocol.jobs import ChatJob, SamplingParams
from workers.engines.chat.detokenizer import Vocabulary
from workers.engines.chat.sequence import Request, Sampling, Sequence

RESERVED_TEMPLATE_NAMES = frozenset(
    {
        "conversation",
        "messages",
        "chat_template",
        "tokenize",
        "add_generation_prompt",
        "continue_final_message",
    }
    | {"padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"}
    | {"tokenizer_kwargs", "sanitize_control_tokens"}
)
"""Arguments of `apply_chat_template` that a request's `chat_template_kwargs` must not set."""


class PromptBuilder:
    """Builds the requests for one model."""

    def __init__(self, tokenizer: Any, generation: Any, vocabulary_size: int, max_context: int) -> None:
        """`generation`: the model's generation config.

        `max_context`: limit of prompt and answer together, in tokens.
        """
        self._tokenizer = tokenizer
        self._generation = generation
        self._vocabulary = Vocabulary.of(tokenizer)
        self._vocabulary_size = vocabulary_size
        self._max_context = max_context
        self._eos = _eos_token_ids(generation, tokenizer)
        # transformers' tokenizers keep state (truncation, padding) that two threads must not change at once
        self._lock = threading.Lock()

    @property
    def vocabulary(self) -> Vocabulary:
        return self._vocabulary

    def build(self, job: ChatJob) -> Request:
        """Build the request of a job. Raises InvalidRequest or ContextLengthExceeded."""
        prompt = self._encode(job)
        if not prompt:
            raise InvalidRequest(
                "the model's chat template turns these messages into an empty prompt", param="messages"
            )
        if len(prompt) >= self._max_context:
            raise ContextLengthExceeded(
                f"the model's context is {self._max_context} tokens and the messages have {len(prompt)};"
                " shorten them and leave room for the answer",
                param="messages",
            )
        sampling = self._resolve(job.sampling, self._max_context - len(prompt))
        request = Request(job.id, prompt, sampling)
        for index in range(sampling.n):
            request.sequences.append(Sequence(request, index, self._vocabulary.detokenizer(sampling.stop)))
        return request

    def _encode(self, job: ChatJob) -> list[int]:
        if clash := RESERVED_TEMPLATE_NAMES & job.chat_template_kwargs.keys():
            raise InvalidRequest(
                f"chat_template_kwargs can't set {', '.join(sorted(clash))}", param="chat_template_kwargs"
            )
        try:
            with self._lock:
                text = self._tokenizer.apply_chat_template(
                    job.messages,
                    tokenize=False,
                    add_generation_prompt=not job.continue_final_message,
                    continue_final_message=job.continue_final_message,
                    **job.chat_template_kwargs,
                )
                ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        except TemplateError as error:
            raise InvalidRequest(
                f"the model's chat template rejects the messages: {str(error)[:200]}", param="messages"
            ) from error
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            # the text of an error inside the template may quote the prompt, so only its type is named
            raise InvalidRequest(
                f"the model's chat template can't be applied to the messages ({type(error).__name__})",
                param="messages",
            ) from error
        return ids

    def _resolve(self, params: SamplingParams, room: int) -> Sampling:
        """Fill in defaults. `room`: number of tokens that the context leaves for the answer."""
        outside = [token for token in params.logit_bias if not 0 <= token < self._vocabulary_size]
        if outside:
            raise InvalidRequest(
                f"logit_bias has token {outside[0]}; the model's tokens are 0 to {self._vocabulary_size - 1}",
                param="logit_bias",
            )
        stops = frozenset(token for token in params.stop_token_ids if 0 <= token < self._vocabulary_size)
        max_tokens = min(params.max_tokens, room)
        return Sampling(
            max_tokens=max_tokens,
            min_tokens=min(params.min_tokens, max_tokens),
            temperature=self._default(params.temperature, "temperature", 1.0),
            top_p=self._default(params.top_p, "top_p", 1.0),
            top_k=int(self._default(params.top_k, "top_k", 0)),
            min_p=self._default(params.min_p, "min_p", 0.0),
            seed=params.seed if params.seed is not None else random.getrandbits(63),
            n=params.n,
            stop=params.stop,
            stop_token_ids=stops if params.ignore_eos else stops | self._eos,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            repetition_penalty=self._default(params.repetition_penalty, "repetition_penalty", 1.0),
            logit_bias=tuple(params.logit_bias.items()),
            logprobs=params.logprobs,
        )

    def _default(self, given: float | None, name: str, neutral: float) -> float:
        """Return the request's value, else the generation config's, else the neutral one."""
        if given is not None:
            return float(given)
        value = getattr(self._generation, name, None)
        if value is None and name == "temperature" and getattr(self._generation, "do_sample", None) is False:
            return 0.0
        return float(neutral if value is None else value)


def _eos_token_ids(generation: Any, tokenizer: Any) -> frozenset[int]:
    eos = getattr(generation, "eos_token_id", None)
    if eos is None:
        eos = tokenizer.eos_token_id
    if eos is None:
        return frozenset()
    return frozenset([eos] if isinstance(eos, int) else eos)
