"""How a model writes its answers, found out from its tokenizer when it is loaded."""

import json
import logging
from collections.abc import Mapping
from typing import Any

from transformers.utils.chat_parsing.response_templates import load_response_template

from protocol.errors import UnsupportedParameter
from protocol.jobs import ChatJob
from workers.engines.chat.answer.argument_values import typed
from workers.engines.chat.answer.call_format import PROBE_TOOL, CallFormat, derive, render_calls, takes_text
from workers.engines.chat.answer.call_grammar import AnswerGrammar, CallGrammar
from workers.engines.chat.answer.calls import CallDivider
from workers.engines.chat.answer.constraint import CallConstraint, constrain
from workers.engines.chat.answer.families import FAMILIES, JSON_FORMATS, family_of, without_calls
from workers.engines.chat.answer.gemma_grammar import GemmaFormat, GemmaGrammar
from workers.engines.chat.answer.harmony_grammar import HarmonyGrammar
from workers.engines.chat.answer.marked_stream import MarkedStream
from workers.engines.chat.answer.parser import AnswerParser
from workers.engines.chat.answer.pieces import Divider
from workers.engines.chat.answer.probe import TemplateProbe
from workers.engines.chat.answer.tag_format import derive_tags
from workers.engines.chat.answer.tag_grammar import TagGrammar
from workers.engines.chat.answer.template_calls import CALLS, REASONING, TemplateDivider
from workers.engines.chat.answer.template_inputs import TemplateInputs
from workers.engines.chat.answer.thinking import ThinkDivider, ThinkTags
from workers.engines.chat.detokenizer import Detokenizer, Vocabulary
from workers.engines.chat.grammar.reasoning import Reasoning

log = logging.getLogger(__name__)


class AnswerFormat:
    """What a template reads of a request, and how the model's answers are divided."""

    def __init__(self, tokenizer: Any, tool_format: str | None = None) -> None:
        """`tokenizer`: a transformers tokenizer with a chat template.

        `tool_format`: a name in FAMILIES or JSON_FORMATS, "none" for a model that gets no tools, None: as the
        chat template shows it.
        """
        probe = TemplateProbe(tokenizer)
        self._thinking = ThinkTags.of(probe)
        self._template: dict[str, Any] | None = None
        """A response template of transformers."""
        self._calls: CallFormat | None = None
        if tool_format in JSON_FORMATS:
            self._calls = JSON_FORMATS[tool_format]
        elif tool_format in FAMILIES:
            self._template = FAMILIES[tool_format].template
        else:
            self._find(probe, tokenizer)
        known = self._calls is not None or CALLS in self._fields
        self._takes_tools = known and tool_format != "none" and (bool(tool_format) or probe.shows(PROBE_TOOL))
        text_arguments = self._calls.text_arguments if self._calls else known is False and takes_text(probe)
        self.inputs = TemplateInputs(probe, text_arguments)
        added = {token.content: id for id, token in tokenizer.added_tokens_decoder.items()}
        self._gemma = None if self._template is None else GemmaFormat.of(probe, self._thinking)
        self._tags = None if self._template is None else derive_tags(probe, self._thinking)
        self._grammar = self._write_grammar(added)
        self._shown = {tools: self._special_tokens(tokenizer, tools) for tools in (False, True)}

    def _write_grammar(self, added: Mapping[str, int]) -> AnswerGrammar | None:
        """Return None if the model's calls can't be constrained."""
        if self._calls is not None:
            return CallGrammar(self._calls, added)
        family = next((family for family in FAMILIES.values() if family.template is self._template), None)
        if family is FAMILIES["harmony"]:
            return HarmonyGrammar.of(family.closings, added)
        if family is FAMILIES["gemma4"] and self._gemma is not None:
            return GemmaGrammar(self._gemma, family.openings, family.closings, added)
        # the catalogue may name another family than the one that the chat template shows
        if family is None or self._tags is None or not self._tags.after_value.endswith(family.closings):
            return None
        return TagGrammar(self._tags, family.openings, family.closings, added)

    def _find(self, probe: TemplateProbe, tokenizer: Any) -> None:
        """Find the format in the tokenizer's own response template, or by the chat template."""
        own = getattr(tokenizer, "response_template", None)
        try:
            self._template = own if own and load_response_template(own) else None
        except (ValueError, KeyError, TypeError) as error:
            log.warning("the tokenizer's response_template is not used: %s", error)
        if self._template is not None and CALLS in self._fields:
            return
        if family := family_of(render_calls(probe, 1, as_text=False) or ""):
            self._template = FAMILIES[family].template
        elif calls := derive(probe, self._thinking):
            self._calls, self._template = calls, None

    @property
    def _fields(self) -> frozenset[str]:
        return frozenset(self._template["fields"]) if self._template else frozenset()

    @property
    def _template_reasons(self) -> bool:
        return bool(self._fields & REASONING)

    def _special_tokens(self, tokenizer: Any, tools: bool) -> Mapping[int, str]:
        """The special tokens that an answer is divided at, by id."""
        texts = list(self._thinking or ())
        if tools and self._calls is not None:
            texts += [self._calls.opening, self._calls.closing, self._calls.separator or ""]
            texts += [text for text in self._calls.syntax if isinstance(text, str)]
        if tools:
            texts += self._tags or ()
        if self._template is not None and (tools or self._divides_always):
            texts.append(json.dumps(self._template, ensure_ascii=False).replace("\\", ""))
        return {
            token: added.content
            for token, added in tokenizer.added_tokens_decoder.items()
            if added.special and any(added.content in text for text in texts)
        }

    @property
    def _divides_always(self) -> bool:
        """Whether the response template is needed to tell the reasoning."""
        return self._template_reasons and self._thinking is None

    def constraint(self, job: ChatJob) -> CallConstraint | None:
        """Return what the calls of an answer must be; None: anything. Raises UnsupportedParameter."""
        return constrain(job, self._grammar)

    def check(self, job: ChatJob) -> None:
        """Raise UnsupportedParameter for tools that the model can't call."""
        if job.tools and not self._takes_tools:
            raise UnsupportedParameter(
                f"tools are not supported by model {job.model!r}: its chat template doesn't show how it calls"
                " them; leave them out",
                param="tools",
            )

    def before_content(self, job: ChatJob, prompt: str) -> Reasoning | None:
        """Return the reasoning that may come before an answer's content; None: there is none.

        `prompt`: the rendered text. Raises UnsupportedParameter if content isn't the rest of the text.
        """
        if self._divides_always and not job.tools:
            raise UnsupportedParameter(
                f"structured output is not supported by model {job.model!r}: its answers have several channels",
                param=job.output_format.param if job.output_format else None,
            )
        if self._divides_always and job.continue_final_message:
            raise UnsupportedParameter(
                f"model {job.model!r} can't go on with a message and be held to calls: its answers have several"
                " channels",
                param="continue_final_message",
            )
        if self._thinking is None:
            return None
        opened = _is_opened(self._thinking, job, prompt)
        closed = job.continue_final_message or prompt[-1000:].rstrip().endswith(self._thinking.close)
        return None if closed and not opened else Reasoning(*self._thinking, opened)

    def parser(self, job: ChatJob, prompt: str) -> AnswerParser | None:
        """Make the parser of one choice; None for a model whose answers are content alone.

        `prompt`: the rendered text.
        """
        has_tools = bool(job.tools)
        template = self._template if has_tools or self._divides_always else None
        dividers: list[Divider] = []
        if self._thinking is not None and not (template and self._template_reasons):
            opened = _is_opened(self._thinking, job, prompt)
            dividers.append(ThinkDivider(self._thinking, opened=opened, started=job.continue_final_message))
        if template is not None:
            read = prompt if self._template_reasons else ""
            quoted = template["fields"].get(CALLS, {}).get("content") == "json"
            tools = typed(job.tools, quoted=quoted)
            dividers.append(TemplateDivider(template if has_tools else without_calls(template), read, tools))
        elif has_tools and self._calls is not None:
            names = frozenset(tool["function"]["name"] for tool in job.tools)
            dividers.append(CallDivider(self._calls, names))
        if not dividers:
            return None
        return AnswerParser(
            dividers,
            job.sampling.stop,
            has_tools=has_tools,
            parallel=job.parallel_tool_calls,
        )

    def detokenizer(self, vocabulary: Vocabulary, job: ChatJob) -> Detokenizer:
        """Make the detokenizer for a choice with a parser, which looks for stop strings itself."""
        shown = self._shown[bool(job.tools)]
        return Detokenizer(MarkedStream(vocabulary.stream, shown)) if shown else vocabulary.detokenizer(())


def _is_opened(tags: ThinkTags, job: ChatJob, prompt: str) -> bool:
    """Whether the text before the answer ends inside the reasoning."""
    if job.continue_final_message:
        return tags.is_open_in(job.messages[-1]["content"])
    return tags.is_open(prompt)
