"""Turns a job into a request: chat template, tokens, sampling parameters with defaults filled in.

Runs in the thread that submits, never in the engine thread.
"""

from collections.abc import Callable
from typing import Any

from jinja2 import TemplateError

from protocol.errors import Cancelled, ContextLengthExceeded, InvalidRequest, UnsupportedParameter
from protocol.jobs import ChatJob, CompletionJob, TextJob
from workers.engines.chat.answer.format import AnswerFormat
from workers.engines.chat.detokenizer import Vocabulary
from workers.engines.chat.encoding import PromptEncoder
from workers.engines.chat.end_tokens import end_tokens
from workers.engines.chat.grammar.compiler import GrammarCompiler
from workers.engines.chat.sampling.defaults import SamplingDefaults
from workers.engines.chat.sequence import Request, Sequence
from workers.engines.chat.text_bound import TextBound
from workers.engines.chat.vision.features import PromptImages, ReadImage
from workers.engines.chat.vision.vision import Vision

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

TEXTS = frozenset({"tools", "documents"})
"""Arguments of chat templates that hold texts of a conversation, as messages do."""


class PromptBuilder:
    """Builds the requests for one model."""

    def __init__(
        self,
        tokenizer: Any,
        generation: Any,
        vocabulary_size: int,
        max_context: int,
        *,
        config: Any = None,
        tool_format: str | None = None,
        control_tokens_in_content: bool = False,
        logits_size: int | None = None,
        vision: Vision | None = None,
    ) -> None:
        """`generation` and `config`: the model's generation config and its config for text.

        `vocabulary_size`: number of rows of the embedding. `logits_size`: that of the logits, if it differs.
        `max_context`: limit of prompt and answer together, in tokens.
        `tool_format`: the catalogue's, None: as the chat template shows it.
        `control_tokens_in_content`: see PromptEncoder. `vision`: of a model that takes images. Raises
        EngineLoadError.
        """
        self._tokenizer = tokenizer
        self._vocabulary = Vocabulary.of(tokenizer)
        self._answers = AnswerFormat(tokenizer, tool_format)
        self._vocabulary_size = vocabulary_size
        self._max_context = max_context
        end = end_tokens(generation, config, tokenizer)
        self._defaults = SamplingDefaults(generation, end, vocabulary_size)
        self._vision = vision
        placeholder = vision.reader.placeholder if vision is not None else None
        self._encoder = PromptEncoder(tokenizer, control_tokens_in_content, placeholder)
        self.grammars = GrammarCompiler(tokenizer, max(vocabulary_size, logits_size or 0), end)
        self._bound = TextBound(tokenizer)

    @property
    def takes_images(self) -> bool:
        """Whether messages may have images."""
        return self._vision is not None

    def free(self) -> None:
        """Take no more images: what reads them holds a part of the model."""
        self._vision = None

    @property
    def vocabulary(self) -> Vocabulary:
        return self._vocabulary

    def build(self, job: TextJob, cancelled: Callable[[], bool] = lambda: False) -> Request:
        """Build the request of a job.

        `cancelled` is asked before the prompt is encoded and while a grammar is compiled.

        Raises InvalidRequest, ContextLengthExceeded, Overloaded or Cancelled.
        """
        return self._chat(job, cancelled) if isinstance(job, ChatJob) else self._completion(job, cancelled)

    def _chat(self, job: ChatJob, cancelled: Callable[[], bool]) -> Request:
        self._check_images(job)
        # the text counts, and not the messages: a template may leave out parts of them, as earlier reasoning
        text = self.render(job)
        self._check_length(self._encoder.plain(text), "messages", cancelled)
        prompt, images = self._encoder.encode(text), None
        if job.images:
            prompt, images = self._with_images(prompt, job, cancelled)
        if not prompt:
            raise InvalidRequest(
                "the model's chat template turns these messages into an empty prompt", param="messages"
            )
        request = self._request(job, prompt, "messages")
        sampling = request.sampling
        request.images = images
        grammar = None
        if (wanted := self._answers.constraint(job) or job.output_format) is not None:
            reasoning = self._answers.before_content(job, text)
            grammar = self.grammars.compile(wanted, job.model, reasoning, cancelled)
        for index in range(sampling.n):
            answer = self._answers.parser(job, text)
            if answer is None:
                detokenizer = self._vocabulary.detokenizer(sampling.stop)
            else:
                detokenizer = self._answers.detokenizer(self._vocabulary, job)
            sequence = Sequence(request, index, detokenizer, answer=answer)
            sequence.grammar = grammar and grammar.copy()
            request.sequences.append(sequence)
        return request

    def _completion(self, job: CompletionJob, cancelled: Callable[[], bool]) -> Request:
        prompt = self._prompt(job, job.prompt, cancelled)
        for other in job.checked:
            self._check_tokens(job, self._prompt(job, other, cancelled), "prompt")
        request = self._request(job, prompt, "prompt")
        request.reports_stop_token = True
        if job.echo:
            request.echo = job.prompt if isinstance(job.prompt, str) else self.decode(prompt)
            request.scores_prompt = request.sampling.logprobs is not None
        grammar = None
        if job.output_format is not None:
            grammar = self.grammars.compile(job.output_format, job.model, None, cancelled)
        for index in range(request.sampling.n):
            detokenizer = self._vocabulary.continuing(prompt, request.sampling.stop)
            sequence = Sequence(request, index, detokenizer)
            sequence.grammar = grammar and grammar.copy()
            request.sequences.append(sequence)
        return request

    def _prompt(self, job: CompletionJob, given: str | list[int], cancelled: Callable[[], bool]) -> list[int]:
        """Return the tokens of a prompt. Raises InvalidRequest, ContextLengthExceeded and Cancelled."""
        if isinstance(given, str):
            self._check_length(given, "prompt", cancelled)
            given = self.encode(given, add_special_tokens=job.add_special_tokens)
        if not given:
            raise InvalidRequest("the prompt is empty", param="prompt")
        return given

    def _request(self, job: TextJob, prompt: list[int], param: str) -> Request:
        """Make a request without sequences. Raises InvalidRequest and ContextLengthExceeded."""
        self._check_tokens(job, prompt, param)
        return Request(job.id, prompt, self._defaults.resolve(job.sampling, self._max_context - len(prompt)))

    def _check_tokens(self, job: TextJob, prompt: list[int], param: str) -> None:
        """Raise InvalidRequest or ContextLengthExceeded unless the model can take a prompt."""
        if len(prompt) + min(1, job.sampling.max_tokens) > self._max_context:
            raise self._too_long(f"{len(prompt)}", param)
        if (outside := max(prompt)) >= self._vocabulary_size:
            # an embedding's lookup beyond its rows would end the process on a GPU
            raise InvalidRequest(
                f"{'the messages contain' if param == 'messages' else 'the prompt contains'} token {outside};"
                f" the model's tokens are 0 to {self._vocabulary_size - 1}",
                param=param,
            )

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the tokens of a text that is no chat: see PromptEncoder.encode_raw."""
        return self._encoder.encode_raw(text, add_special_tokens=add_special_tokens)

    def encode_chat(self, job: ChatJob, *, add_generation_prompt: bool) -> list[int]:
        """Return the tokens of a chat's prompt. Raises InvalidRequest."""
        return self._encoder.encode(self.render(job, add_generation_prompt=add_generation_prompt))

    def decode(self, tokens: list[int]) -> str:
        """Return the text of tokens, with the names of special ones."""
        text: str = self._tokenizer.decode(
            tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def _check_length(self, text: str, param: str, cancelled: Callable[[], bool]) -> None:
        """Raise ContextLengthExceeded for a text that has too many characters to be encoded, and
        Cancelled."""
        if (tokens := self._bound.tokens(text)) > self._max_context:
            raise self._too_long(f"at least {tokens}", param)
        if cancelled():
            raise Cancelled

    def _check_images(self, job: ChatJob) -> None:
        """Raise UnsupportedParameter if the model takes no images, InvalidRequest if it takes fewer."""
        if not job.images:
            return
        if self._vision is None:
            raise UnsupportedParameter(
                f"model {job.model!r} takes no images; send text parts", param=job.images[0].param
            )
        if len(job.images) > (most := self._vision.max_images):
            raise InvalidRequest(
                f"the messages have {len(job.images)} images; model {job.model!r} takes at most {most}",
                param=job.images[most].param,
            )

    def _with_images(
        self, prompt: list[int], job: ChatJob, cancelled: Callable[[], bool]
    ) -> tuple[list[int], PromptImages]:
        """Return the prompt with its images' tokens. Raises what ImageReader does, and Cancelled."""
        assert self._vision is not None
        images: list[ReadImage] = []
        total = len(prompt) - len(job.images)
        for image in job.images:
            if cancelled():
                raise Cancelled
            images.append(self._vision.reader.read(image, images))
            total += len(images[-1].ids)
            if total >= self._max_context:
                raise self._too_long(f"at least {total}", "messages")
        return self._vision.reader.place(prompt, images)

    def _too_long(self, tokens: str, param: str) -> ContextLengthExceeded:
        """The error in OpenAI's words, which routers recognize."""
        return ContextLengthExceeded(
            f"This model's maximum context length is {self._max_context} tokens. However, your {param}"
            f" resulted in {tokens} tokens. Please reduce the length of the {param}.",
            param=param,
        )

    def render(self, job: ChatJob, *, add_generation_prompt: bool = True) -> str:
        """Return the prompt as text, with the encoder's marks. Raises InvalidRequest."""
        if clash := RESERVED_TEMPLATE_NAMES & job.chat_template_kwargs.keys():
            raise InvalidRequest(
                f"chat_template_kwargs can't set {', '.join(sorted(clash))}", param="chat_template_kwargs"
            )
        self._answers.check(job)
        variables = self._answers.inputs.variables(job)
        variables |= {name: self._encoder.protect(variables[name]) for name in TEXTS & variables.keys()}
        try:
            text: str = self._tokenizer.apply_chat_template(
                self._encoder.protect(self._answers.inputs.messages(job)),
                tokenize=False,
                add_generation_prompt=add_generation_prompt and not job.continue_final_message,
                continue_final_message=job.continue_final_message,
                **variables,
            )
        except TemplateError as error:
            raise InvalidRequest(
                f"the model's chat template rejects the messages: {self._encoder.plain(str(error))[:200]}",
                param="messages",
            ) from error
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
            # the text of an error inside the template may quote the prompt, so only its type is named
            raise InvalidRequest(
                f"the model's chat template can't be applied to the messages ({type(error).__name__})",
                param="messages",
            ) from error
        return text
