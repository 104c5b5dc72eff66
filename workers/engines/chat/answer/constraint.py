"""What a request asks of the calls in its answer, as a grammar."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from protocol.errors import InvalidRequest, UnsupportedParameter
from protocol.jobs import ChatJob, OutputFormat
from workers.engines.chat.answer.call_grammar import AnswerGrammar, CallableTool

ANY_OBJECT = {"type": "object"}
MAX_LENGTH = 64 * 2**10
"""Characters of all schemas in a grammar, as JSON."""


class WantedSchema(NamedTuple):
    """A schema in a grammar. `optional`: any object may stand for it, if it can't be enforced.

    `unenforceable`: returns, for the client, what of it the notation of calls can't express; None: nothing.
    """

    format: OutputFormat
    optional: bool = False
    unenforceable: Callable[[Any], str | None] = lambda _: None


class CallConstraint(NamedTuple):
    """`write` makes the grammar of `schemas`, as llguidance takes them. `param`: the field that asked for it.

    `unused`: a schema without effect, which is refused as others are.
    """

    schemas: list[WantedSchema]
    write: Callable[[list[Any]], str]
    param: str
    unused: OutputFormat | None = None

    @property
    def text(self) -> str:
        """All that the client has written."""
        unused = [self.unused.text] if self.unused is not None else []
        return "".join([*(schema.format.text for schema in self.schemas), *unused])


def constrain(job: ChatJob, grammar: AnswerGrammar | None) -> CallConstraint | None:
    """Return the constraint of a job's calls; None: there is none, or only that of its output format.

    `grammar`: that of the model, None if its calls can't be constrained. Raises InvalidRequest and
    UnsupportedParameter.
    """
    if not job.tools or not (job.required_tools or job.strict_tools or job.output_format):
        return None
    param = _param(job)
    if grammar is None:
        raise UnsupportedParameter(
            f"{param} is not supported with tools by model {job.model!r}, whose calls can't be constrained;"
            " leave it out",
            param=param,
        )
    answer = job.output_format
    if answer is not None and answer.kind != "json_schema":
        raise UnsupportedParameter(
            f"{answer.param} can't be combined with tools; send a JSON Schema, or no tools",
            param=answer.param,
        )
    names, schemas = _tools(job, grammar)
    if answer is not None and not job.required_tools:
        schemas.append(WantedSchema(answer))

    def write(checked: list[Any]) -> str:
        # the last one is the answer's, if there is one
        tools = [CallableTool(name, schema) for name, schema in zip(names, checked, strict=False)]
        if job.required_tools:
            return grammar.required(tools, parallel=job.parallel_tool_calls)
        if answer is not None:
            return grammar.either(tools, checked[-1], parallel=job.parallel_tool_calls)
        return grammar.free(tools, parallel=job.parallel_tool_calls)

    return CallConstraint(schemas, write, param, answer if job.required_tools else None)


def _tools(job: ChatJob, grammar: AnswerGrammar) -> tuple[list[str], list[WantedSchema]]:
    """Return names and schemas of the tools that may be called. Raises InvalidRequest."""
    places = [
        (index, tool["function"])
        for index, tool in enumerate(job.tools)
        if not job.required_tools or tool["function"]["name"] in job.required_tools
    ]
    texts = [json.dumps(function["parameters"]) for _, function in places]
    strict = [function["name"] in job.strict_tools for _, function in places]
    if sum(len(text) for text, own in zip(texts, strict, strict=True) if own) > MAX_LENGTH:
        raise InvalidRequest(
            f"the parameters of tools that are enforced must have at most {MAX_LENGTH:,} characters together",
            param="tools",
        )
    others = bool(job.required_tools) and sum(map(len, texts)) <= MAX_LENGTH
    schemas = []
    for (index, _), text, own in zip(places, texts, strict, strict=True):
        text = text if own or others else json.dumps(ANY_OBJECT)
        wanted = OutputFormat(kind="json_schema", text=text, param=f"tools.{index}.function.parameters")
        schemas.append(
            WantedSchema(wanted, False, grammar.unenforceable) if own else WantedSchema(wanted, optional=True)
        )
    return [function["name"] for _, function in places], schemas


def _param(job: ChatJob) -> str:
    if job.required_tools:
        return "tool_choice"
    if job.output_format is not None:
        return job.output_format.param
    index = next(at for at, tool in enumerate(job.tools) if tool["function"]["name"] in job.strict_tools)
    return f"tools.{index}.function.strict"
