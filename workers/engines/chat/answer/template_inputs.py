"""What a chat template gets of a request, under the names that it reads."""

from typing import Any

from protocol.errors import UnsupportedParameter
from protocol.jobs import ChatJob
from workers.engines.chat.answer.json_text import write_json
from workers.engines.chat.answer.probe import TemplateProbe

SWITCHES = ("enable_thinking", "thinking")
"""Variables by which templates switch the reasoning on and off."""

REASONING_NAMES = ("reasoning_content", "reasoning", "thinking")
"""Keys under which templates read the reasoning of a message, the most common one first."""


class TemplateInputs:
    """Makes messages and variables for one chat template."""

    def __init__(self, probe: TemplateProbe, text_arguments: bool = False) -> None:
        """`text_arguments`: the template takes the arguments of calls as text."""
        self._text_arguments = text_arguments
        self._has_effort = "reasoning_effort" in probe.variables
        self._switches = [name for name in SWITCHES if name in probe.variables]
        self._reasoning = next((name for name in REASONING_NAMES if name in probe.keys), REASONING_NAMES[0])

    def variables(self, job: ChatJob) -> dict[str, Any]:
        """Return the variables for a job, its tools included. Raises UnsupportedParameter."""
        variables = dict(job.chat_template_kwargs)
        if job.tools:
            variables["tools"] = job.tools
        effort = job.reasoning_effort
        if effort is None:
            return variables
        if not self._has_effort and not self._switches:
            raise UnsupportedParameter(
                f"reasoning_effort is not supported by model {job.model!r}; leave it out",
                param="reasoning_effort",
            )
        variables |= dict.fromkeys(self._switches, effort != "none")
        return variables | ({"reasoning_effort": effort} if self._has_effort else {})

    def messages(self, job: ChatJob) -> list[dict[str, Any]]:
        """Return the messages with the keys that the template reads."""
        return [self._message(message) for message in job.messages]

    def _message(self, message: dict[str, Any]) -> dict[str, Any]:
        calls = message.get("tool_calls")
        if "reasoning_content" in message:
            message = dict(message)
            reasoning = message.pop("reasoning_content")
            # gpt-oss writes either of them before a call, and refuses both
            if not (self._reasoning == "thinking" and calls and message["content"]):
                message[self._reasoning] = reasoning
        if not calls or not self._text_arguments:
            return message
        return {**message, "tool_calls": [_with_text(call) for call in calls]}


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    text = write_json(function["arguments"])
    return {**call, "function": {**function, "arguments": text}}
