"""A request and its choices while the engine works on them.

Tokens are plain integers; torch is not imported here.
"""

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, NamedTuple

from protocol.events import Delta, Event, TokenLogprob, Usage
from workers.engines.chat.answer.parser import AnswerParser
from workers.engines.chat.answer.pieces import Piece, to_event
from workers.engines.chat.detokenizer import Detokenizer

if TYPE_CHECKING:
    from workers.engines.chat.grammar.matcher import Grammar
    from workers.engines.chat.speculation import NgramIndex
    from workers.engines.chat.vision.features import PromptImages


GREEDY_BELOW = 1e-5
"""Temperatures below this mean greedy: logits divided by them would overflow float32."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """SamplingParams with all defaults filled in (prompt.py)."""

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
        """Whether earlier tokens change the logits of the next one."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


class Chunk(NamedTuple):
    """Consecutive tokens of one sequence that a step computes: positions start, start + 1, ... in `slot`."""

    slot: int
    start: int
    tokens: list[int]
    wants_logits: bool
    """Whether the step needs the logits after the last token."""
    scored: bool = False
    """Whether the step needs the logits after every token: those of a prompt that is scored."""
    images: "PromptImages | None" = None
    """Of the sequence's prompt; None: it has none, and positions are the numbers of the tokens."""

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    @property
    def logit_rows(self) -> int:
        """How many rows of logits the step needs."""
        return len(self.tokens) if self.scored else int(self.wants_logits)


class SequenceStatus(Enum):
    """NEW -> WAITING <-> RUNNING -> FINISHED. A fork goes from NEW to RUNNING directly."""

    NEW = auto()
    """Unknown to the scheduler: a choice that will be forked from the request's first one."""
    WAITING = auto()
    """In the scheduler's queue, never started or preempted."""
    RUNNING = auto()
    """Holds a slot and pages of the KV cache."""
    FINISHED = auto()
    """Its last event was made."""


@dataclass(eq=False, slots=True)
class Request:
    """One job: a prompt and `sampling.n` choices that answer it."""

    id: str
    prompt: list[int]
    sampling: Sampling
    sequences: list["Sequence"] = field(default_factory=list)
    cached_tokens: int = 0
    """Prompt tokens that came from the prefix cache."""
    echo: str | None = None
    """The prompt's text, if the answer begins with it."""
    scores_prompt: bool = False
    """Whether the log probabilities of the prompt's tokens are wanted, too."""
    scored: int = 0
    """Prompt tokens whose log probabilities were sent."""
    reports_stop_token: bool = False
    """Whether logprobs include the token that ended a choice, which has no text."""
    images: "PromptImages | None" = None
    """None: the prompt has none."""

    @property
    def unscored(self) -> bool:
        """Whether log probabilities of the prompt are still to be computed."""
        return self.scores_prompt and self.scored < len(self.prompt)

    @property
    def finished(self) -> bool:
        """Whether all choices have ended."""
        return all(sequence.status is SequenceStatus.FINISHED for sequence in self.sequences)

    @property
    def usage(self) -> Usage:
        completion = sum(len(sequence.output) for sequence in self.sequences)
        answers = [sequence.answer for sequence in self.sequences if sequence.answer is not None]
        reasoning = sum(answer.reasoning_tokens for answer in answers) if answers else None
        return Usage(len(self.prompt), completion, self.cached_tokens, reasoning)

    @property
    def has_token(self) -> bool:
        """Whether any choice has a token."""
        return any(sequence.output for sequence in self.sequences)


@dataclass(eq=False, slots=True)
class Sequence:
    """One choice of a request: its tokens, how many of them the KV cache holds, and the text not yet sent."""

    request: Request
    index: int
    detokenizer: Detokenizer
    output: list[int] = field(default_factory=list)
    status: SequenceStatus = SequenceStatus.NEW
    computed: int = 0
    """Number of tokens of prompt and output whose keys and values are in the cache."""
    slot: int = -1
    """Its slot in the KV cache while RUNNING."""
    arrival: int = 0
    """Order of admission: the sequence admitted last is preempted first."""
    grammar: "Grammar | None" = None
    """What its text must be, and where it is in that."""
    answer: AnswerParser | None = None
    """None: the text is content alone."""
    ngrams: "NgramIndex | None" = None
    accepted_drafts: int = 0
    """How many drafts of the previous step were right."""
    unsent_tokens: int = 0
    unsent_logprobs: list[TokenLogprob] = field(default_factory=list)
    length: int = field(init=False)
    """Number of tokens of prompt and output."""

    def __post_init__(self) -> None:
        self.length = len(self.request.prompt) + len(self.output)

    @property
    def sampling(self) -> Sampling:
        return self.request.sampling

    @property
    def independent(self) -> bool:
        """Whether its next token can be chosen before the host has read the one before."""
        return self.request.sampling.logprobs is None and self.grammar is None

    @property
    def uncomputed(self) -> int:
        """Number of tokens the model has yet to compute. 1: a decode step; more: prefill."""
        return self.length - self.computed

    def append(self, token: int) -> None:
        """Add a token to the output."""
        self.output.append(token)
        self.length += 1
        self.unsent_tokens += 1

    def tokens(self, start: int, end: int) -> list[int]:
        """Tokens start..end of prompt and output together."""
        prompt = self.request.prompt
        if start >= len(prompt):
            return self.output[start - len(prompt) : end - len(prompt)]
        return prompt[start:end] + self.output[: max(0, end - len(prompt))]

    def keys(self, start: int, end: int) -> list[int]:
        """What the prefix cache knows the tokens start..end by: those of an image are known by its bytes,
        too."""
        tokens, images = self.tokens(start, end), self.request.images
        return tokens if images is None else images.keys(tokens, start)

    def chunk(self, count: int) -> Chunk:
        """The next `count` tokens to compute. Logits are wanted if they are the last ones."""
        start, end = self.computed, self.computed + count
        tokens = self.tokens(start, end)
        scored, images = self.request.unscored, self.request.images
        return Chunk(self.slot, start, tokens, end == self.length, scored, images)

    def last_token(self) -> Chunk:
        """The chunk of a sequence with one uncomputed token: `chunk(1)`, at less cost."""
        tokens = self.output or self.request.prompt
        return Chunk(self.slot, self.computed, tokens[-1:], True, images=self.request.images)

    def take_delta(
        self, text: str, finish_reason: str | None = None, stop_reason: int | str | None = None
    ) -> Delta:
        """The event for `text` and for all tokens since the previous event."""
        logprobs = self.unsent_logprobs if self.sampling.logprobs is not None else None
        delta = Delta(text, self.index, self.unsent_tokens, finish_reason, stop_reason, logprobs)
        self.unsent_tokens, self.unsent_logprobs = 0, []
        return delta

    def take_event(self, piece: Piece) -> Event:
        """The event for a piece of the answer and for all tokens since the previous event."""
        delta = self.take_delta("")
        return to_event(piece, self.index, delta.tokens, delta.logprobs)
