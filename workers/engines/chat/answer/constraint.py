"""What a request asks of the calls in its answer, as a grammar."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from protocol.errors import InvalidRequest, UnsupportedParameter
from protocol.jobs import ChatJob, OutputFormat
from workers.engines.chat.answer.call_grammar import CallableTool, CallGrammar

ANY_OBJECT = {"type": "object"}
MAX_LENGTH = 64 * 2**10
"""Characters of all schemas in a grammar, as JSON."""


class CallConstraint(NamedTuple):
    """`write` makes the grammar of `schemas`, as llguidance takes them. `param`: the field that asked for it."""

    schemas: list[OutputFormat]
    write: Callable[[list[Any]], str]
    param: str


def constrain(job: ChatJob, grammar: CallGrammar | None) -> CallConstraint | None:
    """Return the constraint of a job's calls; None: there is none, or only that of its output format.

    `grammar`: that of the model, None if its calls can't be constrained. Raises UnsupportedParameter.
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
    names, schemas = [], []
    for index, tool in enumerate(job.tools):
        name, schema = tool["function"]["name"], tool["function"]["parameters"]
        if job.required_tools and name not in job.required_tools:
            continue
        enforced = bool(job.required_tools) or name in job.strict_tools
        names.append(name)
        text = json.dumps(schema if enforced else ANY_OBJECT)
        schemas.append(
            OutputFormat(kind="json_schema", text=text, param=f"tools.{index}.function.parameters")
        )
    if sum(len(schema.text) for schema in schemas) > MAX_LENGTH:
        raise InvalidRequest(
            f"the parameters of tools that are enforced must have at most {MAX_LENGTH:,} characters together",
            param="tools",
        )
    answer = None if job.required_tools else job.output_format
    if answer is not None:
        if answer.kind != "json_schema":
            raise UnsupportedParameter(
                f"{param} can't be combined with tools; send a JSON Schema, or no tools", param=param
            )
        schemas.append(answer)

    def write(checked: list[Any]) -> str:
        # the last one is the answer's, if there is one
        tools = [CallableTool(name, schema) for name, schema in zip(names, checked, strict=False)]
        if job.required_tools:
            return grammar.required(tools, parallel=job.parallel_tool_calls)
        if answer is not None:
            return grammar.either(tools, checked[-1], parallel=job.parallel_tool_calls)
        return grammar.free(tools, parallel=job.parallel_tool_calls)

    return CallConstraint(schemas, write, param)


def _param(job: ChatJob) -> str:
    if job.required_tools:
        return "tool_choice"
    if job.output_format is not None:
        return job.output_format.param
    index = next(at for at, tool in enumerate(job.tools) if tool["function"]["name"] in job.strict_tools)
    return f"tools.{index}.function.strict"
