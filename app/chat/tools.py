"""The tools of a chat request: fields, bounds, and what of them a worker gets."""

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr

from app.chat.messages import FunctionName, is_too_deep
from protocol.errors import InvalidRequest

MAX_TOOLS = 128


class FunctionDefinition(BaseModel):
    """`parameters` is a JSON Schema. Without it the function takes no arguments."""

    model_config = ConfigDict(extra="ignore")

    name: FunctionName
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None


class Tool(BaseModel):
    model_config = ConfigDict(extra="ignore")

    type: Literal["function"]
    function: FunctionDefinition


class FunctionChoice(BaseModel):
    model_config = ConfigDict(extra="ignore")

    name: FunctionName


class ToolChoice(BaseModel):
    model_config = ConfigDict(extra="ignore")

    type: Literal["function"]
    function: FunctionChoice


Tools = Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_TOOLS)]


class JobTools(NamedTuple):
    """Fields of a ChatJob."""

    tools: list[dict[str, Any]]
    strict_tools: list[str]
    required_tools: list[str]
    parallel_tool_calls: bool


def tools_for_job(
    tools: list[Tool] | None, choice: str | ToolChoice | None, parallel: bool | None
) -> JobTools:
    """Return the tools that the model may call, as chat templates expect them, and those that it must call.

    Raises InvalidRequest.
    """
    made = [_for_template(tool.function, f"tools.{index}") for index, tool in enumerate(tools or [])]
    names = [tool.function.name for tool in tools or []]
    if choice == "none":
        return JobTools([], [], [], True)
    strict = [tool.function.name for tool in tools or [] if tool.function.strict]
    required = _required(names, choice)
    # a named function is called once
    return JobTools(made, strict, required, parallel is not False and not isinstance(choice, ToolChoice))


def _required(names: list[str], choice: str | ToolChoice | None) -> list[str]:
    """Return the names of the tools of which one must be called; none if the model may do without."""
    if choice == "required":
        if not names:
            raise InvalidRequest("tool_choice 'required' needs tools", param="tool_choice")
        return names
    if isinstance(choice, ToolChoice):
        if choice.function.name not in names:
            raise InvalidRequest(
                "tool_choice must name a function of tools", param="tool_choice.function.name"
            )
        return [choice.function.name]
    return []


def _for_template(function: FunctionDefinition, place: str) -> dict[str, Any]:
    parameters = function.parameters or {"type": "object", "properties": {}}
    if is_too_deep(parameters):
        raise InvalidRequest("parameters are nested too deeply", param=f"{place}.function.parameters")
    described = {"name": function.name, "description": function.description, "parameters": parameters}
    return {
        "type": "function",
        "function": {key: value for key, value in described.items() if value is not None},
    }
