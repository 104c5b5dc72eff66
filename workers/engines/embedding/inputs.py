"""Turns the inputs of a job into tokens, within the model's limit and the service's.

Runs in the thread that submits, never in the engine thread.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from protocol.errors import Cancelled, ContextLengthExceeded, InvalidRequest
from protocol.jobs import EmbeddingJob

MAX_REQUEST_TOKENS = 300_000
"""Of all inputs of a request, as in OpenAI's API."""
TEXTS_AT_ONCE = 32
HEAD_CHARACTERS = 16
"""Characters for each token that an input may have, which are tokenized first."""
MARGIN = 128
"""A text that was cut may end in more tokens than it had there: in those of a word without its end. A text
whose beginning has this many above the limit has too many itself."""
GROWTH = 4


class InputEncoder:
    """Encodes the inputs for one model. Any number of threads may use it at once."""

    def __init__(self, tokenizer: Any, vocabulary_size: int, max_tokens: int, *, lower_case: bool) -> None:
        """`tokenizer`: a transformers tokenizer, which nothing may change afterwards.

        `max_tokens`: of an input.
        """
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
            # in the pool of tokenizers, which has a thread for each core, short texts would wait for long
            # ones; tokenizers reads this at each call
            os.putenv("TOKENIZERS_PARALLELISM", "false")
        self._vocabulary_size = vocabulary_size
        self._max_tokens = max_tokens
        self._lower_case = lower_case

    def encode(self, job: EmbeddingJob, cancelled: Callable[[], bool] = lambda: False) -> list[list[int]]:
        """Return the tokens of each input. `cancelled` is asked again and again.

        Raises InvalidRequest, ContextLengthExceeded or Cancelled.
        """
        limit = self._limit(job)
        encoded: list[list[int]] = []
        total = 0
        for first in range(0, len(job.inputs), TEXTS_AT_ONCE):
            if cancelled():
                raise Cancelled
            for tokens in self._encode_some(job, first, limit):
                total += len(tokens)
                encoded.append(tokens)
            if total > MAX_REQUEST_TOKENS:
                raise InvalidRequest(
                    f"a request may have {MAX_REQUEST_TOKENS} tokens in all inputs together; the first"
                    f" {len(encoded)} of {len(job.inputs)} have {total}",
                    param="input",
                )
        return encoded

    def _limit(self, job: EmbeddingJob) -> int:
        wanted = job.truncate_prompt_tokens
        if wanted is None or wanted == -1:
            return self._max_tokens
        if wanted > self._max_tokens:
            raise InvalidRequest(
                f"truncate_prompt_tokens must be at most {self._max_tokens}, this model's limit"
                f" (it is {wanted})",
                param="truncate_prompt_tokens",
            )
        return wanted

    def _encode_some(self, job: EmbeddingJob, first: int, limit: int) -> Iterator[list[int]]:
        """The tokens of the inputs from `first` on, as many as are encoded at once."""
        inputs = job.inputs[first : first + TEXTS_AT_ONCE]
        texts = iter(self._heads([part for part in inputs if isinstance(part, str)], limit))
        truncates = job.truncate_prompt_tokens is not None
        for place, part in enumerate(inputs, first):
            text, tokens, is_whole = next(texts) if isinstance(part, str) else ("", part, True)
            if len(tokens) > limit and not truncates:
                raise self._too_long(f"{'' if is_whole else 'at least '}{len(tokens)}", *named(job, place))
            if len(tokens) > limit:
                tokens = self._truncate(text, limit) if isinstance(part, str) else tokens[:limit]
            if not tokens:
                name, param = named(job, place)
                raise InvalidRequest(f"{name} has no tokens", param=param)
            if (outside := max(tokens)) >= self._vocabulary_size:
                # an embedding's lookup beyond its rows would end the process on a GPU
                name, param = named(job, place)
                raise InvalidRequest(
                    f"{name} contains token {outside}; the model's tokens are 0 to"
                    f" {self._vocabulary_size - 1}",
                    param=param,
                )
            yield tokens

    def _heads(self, texts: Sequence[str], limit: int) -> list[tuple[str, list[int], bool]]:
        """Return each text, its tokens and True. Of a text with too many tokens its beginning and False.

        Megabytes take seconds, and their number does not tell that of the tokens: tokenizers drop spaces.
        """
        if self._lower_case:
            texts = [text.lower() for text in texts]
        size = HEAD_CHARACTERS * (limit + MARGIN)
        heads = [text[:size] for text in texts]
        found = []
        for text, head, encoded in zip(texts, heads, self._tokenize(heads), strict=True):
            tokens = encoded
            while len(head) < len(text) and len(tokens) <= limit + MARGIN:
                head = text[: GROWTH * len(head)]
                (tokens,) = self._tokenize([head])
            found.append((head, tokens, len(head) == len(text)))
        return found

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        if self._backend is None:
            return [self._tokenizer(text)["input_ids"] for text in texts]
        # `encode` would hold the interpreter's lock
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts)]

    def _truncate(self, text: str, limit: int) -> list[int]:
        """Return the first tokens of a text, with those that the tokenizer puts around it.

        Raises InvalidRequest.
        """
        if self._backend is None:
            truncated: list[int] = self._tokenizer(text, truncation=True, max_length=limit)["input_ids"]
            return truncated
        room = limit - self._backend.num_special_tokens_to_add(False)
        if room < 1:
            raise InvalidRequest(
                f"truncate_prompt_tokens must be at least {limit - room + 1} for this model",
                param="truncate_prompt_tokens",
            )
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=False)
        encoding.truncate(room)
        ids: list[int] = self._backend.post_process(encoding).ids
        return ids

    def _too_long(self, tokens: str, name: str, param: str) -> ContextLengthExceeded:
        """The error in OpenAI's words, which routers recognize."""
        return ContextLengthExceeded(
            f"This model's maximum context length is {self._max_tokens} tokens. However, {name} has {tokens}"
            " tokens. Please reduce its length, or send truncate_prompt_tokens.",
            param=param,
        )


def named(job: EmbeddingJob, place: int) -> tuple[str, str]:
    """Return what a message calls an input, and the field that it is."""
    return ("the input", "input") if len(job.inputs) == 1 else (f"input {place}", f"input.{place}")
