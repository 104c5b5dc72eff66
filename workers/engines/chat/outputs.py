"""The requests that are in the engine, and the events that the next emit will carry.

Used by the engine thread only.
"""

from collections.abc import Callable

from protocol.errors import Cancelled, DeadlineExceeded, EngineError
from protocol.events import Echo, Event, Failed, Finished, TokenLogprob, TopLogprob
from workers.engines.base import CancelReason
from workers.engines.chat.answer.pieces import Piece
from workers.engines.chat.detokenizer import Vocabulary
from workers.engines.chat.metrics import Metrics
from workers.engines.chat.sampling.sampler import Logprobs
from workers.engines.chat.scheduler import BatchScheduler
from workers.engines.chat.sequence import Request, Sequence, SequenceStatus


class RequestOutputs:
    """Turns tokens into events, and ends choices and requests.

    `on_end` is called with the id of each ended request.
    """

    def __init__(
        self,
        scheduler: BatchScheduler,
        vocabulary: Vocabulary,
        metrics: Metrics,
        on_end: Callable[[str], None],
    ) -> None:
        self._scheduler = scheduler
        self._vocabulary = vocabulary
        self._metrics = metrics
        self._on_end = on_end
        self._events: list[tuple[str, Event]] = []
        self.by_id: dict[str, Request] = {}

    def add(self, request: Request) -> None:
        """Take a new request and put its first choice into the scheduler's queue."""
        self.by_id[request.id] = request
        if request.echo is not None:
            self._events.append((request.id, Echo(request.echo)))
        if request.scores_prompt:
            text, own = self._vocabulary.describe(request.prompt[0])
            self._send_scores(request, [TokenLogprob(text, None, own)])
        if request.sampling.max_tokens == 0 and not request.unscored:
            self._finish_all(request)
            return
        # the other choices are forked from the first one once the prompt is computed
        self._scheduler.add(request.sequences[0])

    def take_events(self) -> list[tuple[str, Event]]:
        """Return the events since the last call."""
        events, self._events = self._events, []
        return events

    def score(self, request: Request, start: int, logprobs: list[Logprobs]) -> None:
        """Send the log probabilities of the prompt's tokens from number `start` on, which may be known in
        part."""
        known = request.scored - start
        own = [
            self._token_logprob(token, each)
            for token, each in zip(request.prompt[request.scored :], logprobs[known:], strict=False)
        ]
        if own:
            self._send_scores(request, own)
        if request.sampling.max_tokens == 0 and not request.unscored:
            self._finish_all(request)

    def _send_scores(self, request: Request, logprobs: list[TokenLogprob]) -> None:
        request.scored += len(logprobs)
        self._events.append((request.id, Echo("", logprobs=logprobs)))

    def advance(self, sequence: Sequence, token: int, logprobs: Logprobs | None) -> None:
        """Give a choice its token: text, stop conditions, events. logprobs: None if they aren't wanted.

        Raises what Grammar.accept does, and EngineError if reasoning and content can't be told apart.
        """
        if sequence.status is SequenceStatus.FINISHED:
            return  # another choice of its request failed in this step
        sampling = sequence.sampling
        sequence.append(token)
        self._metrics.output_tokens += 1
        complete = sequence.grammar is not None and sequence.grammar.accept(token)
        may_stop = complete or len(sequence.output) > sampling.min_tokens
        if may_stop and token in sampling.stop_token_ids:
            if logprobs is not None and sequence.request.reports_stop_token:
                sequence.unsent_logprobs.append(self._token_logprob(token, logprobs))
            self._finish(sequence, "stop", token)
            return
        if logprobs is not None:
            sequence.unsent_logprobs.append(self._token_logprob(token, logprobs))
        text, stop = sequence.detokenizer.add(token, may_stop)
        if sequence.answer is not None:
            pieces, stop = sequence.answer.feed(text, may_stop)
            self._send(sequence, pieces)
            text = ""
            if sequence.grammar is not None and sequence.grammar.thinking and not sequence.answer.thinking:
                # the rest would be sent as content, and the grammar takes it for reasoning
                raise EngineError("the model wrote the end of its reasoning as ordinary text")
        if stop is not None:
            self._finish(sequence, "stop", stop, text, flush=False)
        elif sequence.answer is not None and sequence.answer.complete:
            self._finish(sequence, "stop", flush=False)
        elif complete:
            self._finish(sequence, "stop", None, text)
        elif len(sequence.output) >= sampling.max_tokens:
            self._finish(sequence, "length", None, text)
        elif text:
            self._events.append((sequence.request.id, sequence.take_delta(text)))

    def _finish(
        self,
        sequence: Sequence,
        finish_reason: str,
        stop_reason: int | str | None = None,
        text: str = "",
        flush: bool = True,
    ) -> None:
        """End a choice, and its request if it was the last one."""
        request = sequence.request
        if flush:
            rest, stop = sequence.detokenizer.flush()
            text += rest
            if sequence.answer is not None:
                pieces, stop = sequence.answer.finish(text, cut=finish_reason == "length")
                self._send(sequence, pieces)
                text = ""
            if stop is not None:
                finish_reason, stop_reason = "stop", stop
        if sequence.answer is not None and sequence.answer.calls and finish_reason == "stop":
            finish_reason = "tool_calls"
        self._events.append((request.id, sequence.take_delta(text, finish_reason, stop_reason)))
        self._scheduler.remember(sequence)
        self._scheduler.finish([sequence])
        if request.finished:
            self._close(request, Finished(request.usage))

    def _send(self, sequence: Sequence, pieces: list[Piece]) -> None:
        for piece in pieces:
            self._events.append((sequence.request.id, sequence.take_event(piece)))

    def fail(self, request: Request, failure: Failed) -> None:
        """End a request with an error."""
        self._scheduler.finish(request.sequences)
        self._close(request, failure)

    def _close(self, request: Request, event: Event) -> None:
        if self.by_id.pop(request.id, None) is None:
            return
        # now, and not when the request and its sequences, which refer to each other, are collected
        request.images = None
        self._events.append((request.id, event))
        self._on_end(request.id)

    def _token_logprob(self, token: int, logprobs: Logprobs) -> TokenLogprob:
        describe = self._vocabulary.describe
        top = []
        for other, logprob in logprobs.top:
            text, own = describe(other)
            top.append(TopLogprob(text, logprob, own))
        text, own = describe(token)
        return TokenLogprob(text, logprobs.own, own, top)

    def cancel(self, request: Request, reason: CancelReason) -> None:
        """End a request as Engine.cancel specifies."""
        if reason == "cancelled":
            self.fail(request, Failed.of(Cancelled()))
        elif not request.has_token:
            self.fail(request, Failed.of(DeadlineExceeded()))
        else:
            self._finish_all(request)

    def _finish_all(self, request: Request) -> None:
        for sequence in request.sequences:
            if sequence.status is not SequenceStatus.FINISHED:
                self._finish(sequence, "length", flush=bool(sequence.output))
