"""The tools of a chat request: fields, bounds, and what of them a worker gets."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr

from app.chat.messages import FunctionName, is_too_deep
from protocol.errors import InvalidRequest, UnsupportedParameter

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


def tools_for_job(
    tools: list[Tool] | None, choice: str | ToolChoice | None, model: str
) -> list[dict[str, Any]]:
    """Return the tools that the model may call, as chat templates expect them; none if it must not call any.

    Raises InvalidRequest and UnsupportedParameter.
    """
    if choice == "required" or isinstance(choice, ToolChoice):
        raise UnsupportedParameter(
            f"tool_choice can be 'none' or 'auto' with model {model!r}; a call can't be forced",
            param="tool_choice",
        )
    made = [_for_template(tool.function, f"tools.{index}") for index, tool in enumerate(tools or [])]
    return [] if choice == "none" else made


def _for_template(function: FunctionDefinition, place: str) -> dict[str, Any]:
    if function.strict:
        raise UnsupportedParameter(
            "strict is not supported; leave it out, and check the arguments of calls",
            param=f"{place}.function.strict",
        )
    parameters = function.parameters or {"type": "object", "properties": {}}
    if is_too_deep(parameters):
        raise InvalidRequest("parameters are nested too deeply", param=f"{place}.function.parameters")
    described = {"name": function.name, "description": function.description, "parameters": parameters}
    return {
        "type": "function",
        "function": {key: value for key, value in described.items() if value is not None},
    }
