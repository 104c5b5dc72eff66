"""What is kept of a request for a chat or a completion."""

from typing import NamedTuple


class TextParams(NamedTuple):
    """What a response needs of its request. No more is kept: thousands of streams are open at once."""

    id: str
    model: str
    choices: int
    stream: bool
    include_usage: bool
    ignored: str
    resumable: bool = False
