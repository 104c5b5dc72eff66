"""How a model writes its answers, found out from its tokenizer when it is loaded."""

from collections.abc import Mapping
from typing import Any

from protocol.errors import UnsupportedParameter
from protocol.jobs import ChatJob
from workers.engines.chat.answer.marked_stream import MarkedStream
from workers.engines.chat.answer.parser import AnswerParser
from workers.engines.chat.answer.probe import TemplateProbe
from workers.engines.chat.answer.thinking import ThinkDivider, ThinkTags
from workers.engines.chat.detokenizer import Detokenizer, Vocabulary

SWITCHES = ("enable_thinking", "thinking")
"""Variables by which templates switch the reasoning on and off."""

REASONING_NAMES = ("reasoning_content", "reasoning", "thinking")
"""Keys under which templates read the reasoning of a message, the most common one first."""


class AnswerFormat:
    """What a template reads of earlier answers, and how the model's own answers are divided."""

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer`: a transformers tokenizer with a chat template."""
        probe = TemplateProbe(tokenizer)
        self._thinking = ThinkTags.of(probe)
        self._has_effort = "reasoning_effort" in probe.variables
        self._switches = [name for name in SWITCHES if name in probe.variables]
        self._reasoning_name = next((name for name in REASONING_NAMES if name in probe.keys), None)
        self._shown = self._special_tokens(tokenizer)

    def _special_tokens(self, tokenizer: Any) -> Mapping[int, str]:
        """The special tokens that an answer is divided at, by id."""
        texts = "\n".join(self._thinking or ())
        return {
            token: added.content
            for token, added in tokenizer.added_tokens_decoder.items()
            if added.special and added.content in texts
        }

    def template_arguments(self, job: ChatJob) -> dict[str, Any]:
        """Return the variables of the chat template for a job. Raises UnsupportedParameter."""
        arguments = dict(job.chat_template_kwargs)
        effort = job.reasoning_effort
        if effort is None:
            return arguments
        if not self._has_effort and not self._switches:
            raise UnsupportedParameter(
                f"reasoning_effort is not supported by model {job.model!r}; leave it out",
                param="reasoning_effort",
            )
        switches = dict.fromkeys(self._switches, effort != "none")
        return {**arguments, **switches, **({"reasoning_effort": effort} if self._has_effort else {})}

    def messages(self, job: ChatJob) -> list[dict[str, Any]]:
        """Return the messages with the names that the template reads."""
        name = self._reasoning_name
        if name in (None, "reasoning_content"):
            return job.messages
        return [
            {name if key == "reasoning_content" else key: value for key, value in message.items()}
            if "reasoning_content" in message
            else message
            for message in job.messages
        ]

    def parser(self, job: ChatJob, prompt: str) -> AnswerParser | None:
        """Make the parser of one choice; None for a model whose answers are content alone.

        `prompt`: the rendered text.
        """
        if self._thinking is None:
            return None
        if job.continue_final_message:
            opened = self._thinking.is_open_in(job.messages[-1]["content"])
        else:
            opened = self._thinking.is_open(prompt)
        divider = ThinkDivider(self._thinking, opened=opened, started=job.continue_final_message)
        return AnswerParser(divider, job.sampling.stop)

    def detokenizer(self, vocabulary: Vocabulary) -> Detokenizer:
        """Make the detokenizer for a choice with a parser, which looks for stop strings itself."""
        if not self._shown:
            return vocabulary.detokenizer(())
        return Detokenizer(MarkedStream(vocabulary.stream, self._shown))
