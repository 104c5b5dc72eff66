"""A request and its choices while the engine works on them. No torch here: tokens are plain integers."""

from dataclasses import dataclass, field
from typing import Protocol

from protocol.events import Delta, TokenLogprob, Usage
from workers.engines.chat.detokenizer import Detokenizer


class TokenMask(Protocol):
    """Guided decoding: what a choice may say next. The sampler asks before each token."""

    def allowed(self, output: list[int]) -> list[int] | None:
        """Token ids that may follow `output`; None: all of them."""


GREEDY_BELOW = 1e-5
"""Temperature: with less, differences between logits grow beyond what float32 holds."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """SamplingParams with nothing left open: every None was resolved (request, generation config, neutral)."""

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def penalised(self) -> bool:
        """Whether earlier tokens change the logits of the next."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


@dataclass(eq=False, slots=True)
class Request:
    """One job: a prompt and `sampling.n` choices that answer it."""

    id: str
    prompt: list[int]
    sampling: Sampling
    sequences: list["Sequence"] = field(default_factory=list)
    cached_tokens: int = 0
    finished: int = 0
    """Choices that have ended."""

    @property
    def usage(self) -> Usage:
        completion = sum(len(sequence.output) for sequence in self.sequences)
        return Usage(len(self.prompt), completion, self.cached_tokens)

    @property
    def has_token(self) -> bool:
        return any(sequence.output for sequence in self.sequences)


@dataclass(eq=False, slots=True)
class Sequence:
    """One choice of a request: its tokens, how many of them the KV cache holds, and the text not yet sent."""

    request: Request
    index: int
    detokenizer: Detokenizer
    output: list[int] = field(default_factory=list)
    computed: int = 0
    """Tokens of prompt and output whose keys and values are in the cache."""
    slot: int = -1
    """Its row in the KV cache's tables; -1 while it waits."""
    arrival: int = 0
    """Order of admission: the youngest is preempted first."""
    finished: bool = False
    mask: TokenMask | None = None
    unsent_tokens: int = 0
    unsent_logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def sampling(self) -> Sampling:
        return self.request.sampling

    @property
    def length(self) -> int:
        """Tokens of prompt and output."""
        return len(self.request.prompt) + len(self.output)

    @property
    def uncomputed(self) -> int:
        """Tokens the model has yet to see. 1: an ordinary decode step; more: prefill."""
        return self.length - self.computed

    def tokens(self, start: int, end: int) -> list[int]:
        """Prompt and output as one list, from `start` to before `end`."""
        prompt = self.request.prompt
        if start >= len(prompt):
            return self.output[start - len(prompt) : end - len(prompt)]
        return prompt[start:end] + self.output[: max(0, end - len(prompt))]

    def take_delta(self, text: str, finish: str | None = None, reason: int | str | None = None) -> Delta:
        """The event for `text` and all tokens since the last one."""
        logprobs = self.unsent_logprobs if self.sampling.logprobs is not None else None
        delta = Delta(text, self.index, self.unsent_tokens, finish, reason, logprobs)
        self.unsent_tokens, self.unsent_logprobs = 0, []
        return delta
