"""How much text a pipeline reads. diffusers cuts off the rest and says so in a log alone."""

import inspect
import math
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer

from protocol.errors import ContextLengthExceeded


class PromptLimit:
    """The longest prompt of a pipeline, in tokens of its tokenizers. Safe to use from several threads.

    A pipeline may have several text encoders. Flux, for example, reads 77 tokens with one of them and 512
    with the other, so a text is too long only when every one of them cuts it off.
    """

    def __init__(self, pipe: Any) -> None:
        """Read the limits of the pipeline's tokenizers; `max_sequence_length` is that of long text
        encoders."""
        parameter = inspect.signature(pipe.__call__).parameters.get("max_sequence_length")
        longest = parameter.default if parameter is not None else None
        encoders: list[tuple[Callable[[str], int], float]] = []
        for name, tokenizer in pipe.components.items():
            limit = min(getattr(tokenizer, "model_max_length", math.inf), longest or math.inf)
            if name.startswith("tokenizer") and tokenizer is not None:
                encoders.append((_counter(tokenizer), limit))
        self._encoders = sorted(encoders, key=lambda encoder: encoder[1])

    def check(self, text: str, param: str) -> None:
        """Raise ContextLengthExceeded for a text that no text encoder reads to its end."""
        if not self._encoders:
            return
        for count, limit in self._encoders:
            used = count(text)
            if used <= limit:
                return
        raise ContextLengthExceeded(
            f"{param} has {used} tokens; this model reads at most {limit}, so shorten it", param=param
        )


def _counter(tokenizer: Any) -> Callable[[str], int]:
    """Return what counts the tokens of a text, with the special ones that the tokenizer adds."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return lambda text: len(tokenizer(text, truncation=False, verbose=False).input_ids)
    # A copy: pipelines switch padding and truncation of theirs on in another thread.
    own = Tokenizer.from_str(backend.to_str())
    own.no_truncation()
    own.no_padding()
    return lambda text: len(own.encode(text).ids)
