"""Fills in the sampling parameters that a request leaves out."""

import random
from typing import Any

from protocol.errors import InvalidRequest
from protocol.jobs import SamplingParams
from workers.engines.chat.sequence import Sampling


class SamplingDefaults:
    """A value comes from the request, else from the model's generation config, else it is the neutral one."""

    def __init__(self, generation: Any, end: frozenset[int], vocabulary_size: int) -> None:
        """`generation`: the generation config. `end`: the tokens that end an answer."""
        self._generation = generation
        self._end = end
        self._vocabulary_size = vocabulary_size

    def resolve(self, params: SamplingParams, room: int) -> Sampling:
        """Fill in defaults. `room`: number of tokens that the context leaves for the answer.

        Raises InvalidRequest.
        """
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
            temperature=self._value(params.temperature, "temperature", 1.0),
            top_p=self._value(params.top_p, "top_p", 1.0),
            top_k=int(self._value(params.top_k, "top_k", 0)),
            min_p=self._value(params.min_p, "min_p", 0.0),
            seed=params.seed if params.seed is not None else random.getrandbits(63),
            n=params.n,
            stop=params.stop,
            stop_token_ids=stops if params.ignore_eos else stops | self._end,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            repetition_penalty=self._value(params.repetition_penalty, "repetition_penalty", 1.0),
            logit_bias=tuple(params.logit_bias.items()),
            logprobs=params.logprobs,
        )

    def _value(self, given: float | None, name: str, neutral: float) -> float:
        if given is not None:
            return float(given)
        if name == "temperature" and getattr(self._generation, "do_sample", None) is False:
            # transformers ignores a temperature beside do_sample false
            return 0.0
        value = getattr(self._generation, name, None)
        return float(neutral if value is None else value)
