"""Encodes rendered prompts. Control tokens are those that the chat template writes: what a message contains
is text, also if it spells one.

Before the template is rendered, each control token in a message gets a mark after its first character. A
control token without a mark is therefore the template's. A second tokenizer knows the control tokens by
secret names only: it encodes the text after the template's got these names and the marks were removed, so
that a message's are encoded as if they were no tokens, together with the text around them.
"""

import os
import re
import secrets
from typing import Any

from workers.engines.base import EngineLoadError
from workers.engines.chat.control_tokens import any_of, by_first_character, control_tokens, renamed


class PromptEncoder:
    """Encodes the prompts for one model. Any number of threads may use it at once."""

    def __init__(
        self, tokenizer: Any, control_tokens_in_content: bool = False, placeholder: str | None = None
    ) -> None:
        """`tokenizer`: a transformers tokenizer, which nothing may change afterwards.

        `placeholder`: what the chat template writes for an image, a control token in any case. With
        `control_tokens_in_content` those of a message are encoded as the template's are. Raises
        EngineLoadError if they can't be told apart.
        """
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is not None:
            # nothing changes the tokenizer afterwards, so that any number of threads may encode at once
            self._backend.no_truncation()
            self._backend.no_padding()
            # in the pool of tokenizers, which has a thread for each core, short prompts would wait for long
            # ones; tokenizers reads this at each call
            os.putenv("TOKENIZERS_PARALLELISM", "false")
        marks = [] if placeholder is None else [placeholder]
        self._controls = {} if control_tokens_in_content else control_tokens(tokenizer, marks)
        self._mark, secret = _secret(), _secret()
        self._names = {control: secret + chr(0xF0000 + at) for at, control in enumerate(self._controls)}
        self._control = re.compile(any_of(self._controls))
        groups = by_first_character(self._controls).items()
        self._starts = re.compile("|".join(f"{re.escape(first)}(?={any_of(rest)})" for first, rest in groups))
        self._renamed: Any = None
        self._always_renamed = False
        if self._backend is not None and self._controls:
            self._renamed = self._rename()
            # a message may spell a control token otherwise than the template does, in capitals for example
            self._always_renamed = self._backend.normalizer is not None and any(
                tokenizer.added_tokens_decoder[token].normalized for token in self._controls.values()
            )

    def protect(self, value: Any) -> Any:
        """Return messages, or any part of them, with a mark in each control token of their texts and keys."""
        if isinstance(value, str):
            return self._starts.sub(rf"\g<0>{self._mark}", value) if self._controls else value
        if isinstance(value, dict):
            return {self.protect(key): self.protect(item) for key, item in value.items()}
        return [self.protect(item) for item in value] if isinstance(value, list) else value

    def plain(self, text: str) -> str:
        """Return a rendered text without marks."""
        return text.replace(self._mark, "")

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a rendered text that may have marks."""
        marked = self._mark in text
        if self._backend is None:
            return self._encode_pieces(text) if marked else self._encode_slowly(text)
        backend = self._backend
        if marked or self._always_renamed:
            backend = self._renamed
            # before the marks are removed: afterwards a message's control tokens look like the template's
            text = self.plain(self._control.sub(lambda found: self._names[found[0]], text))
        # `encode` would hold the interpreter's lock, for 20 s with 8 MB: streams stop, and the lease expires
        (encoding,) = backend.encode_batch_fast([text], add_special_tokens=False)
        ids: list[int] = encoding.ids
        return ids

    def encode_raw(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the tokens of a text in which control tokens are control tokens.

        `add_special_tokens`: with those that the tokenizer puts around a text, as the one for its beginning.
        """
        if self._backend is None:
            slow: list[int] = self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
            return slow
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def _encode_slowly(self, text: str, **options: Any) -> list[int]:
        """Encode by a tokenizer that is written in Python."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, **options)["input_ids"]
        return ids

    def _encode_pieces(self, text: str) -> list[int]:
        """Encode a text with marks by a tokenizer that is written in Python: what lies between the template's
        control tokens is text, in which no added token is found.
        """
        ids: list[int] = []
        for piece in re.split(f"({self._control.pattern})", text):
            if piece in self._controls:
                ids.append(self._controls[piece])
            elif piece:
                ids += self._encode_slowly(self.plain(piece), split_special_tokens=True)
        return ids

    def _rename(self) -> Any:
        """Return a copy of the tokenizer that knows the control tokens by their names.

        Raises EngineLoadError.
        """
        copy = renamed(self._backend, self._names)
        expected = {
            self._names.get(added.content, added.content): token
            for token, added in self._tokenizer.added_tokens_decoder.items()
        }
        moved = {name for name, token in expected.items() if copy.token_to_id(name) != token}
        names = list(self._names.values())
        for name, encoding in zip(
            names, copy.encode_batch_fast(names, add_special_tokens=False), strict=True
        ):
            if expected[name] not in encoding.ids:
                moved.add(name)
        if moved:
            raise EngineLoadError(
                "the tokenizer's control tokens can't be told from the text of messages;"
                " control_tokens_in_content = true in [models.engine] encodes both alike"
            )
        return copy


def _secret() -> str:
    """Return a string that no message can contain, of characters that templates and normalizers keep."""
    return "".join(chr(0xE000 + byte) for byte in secrets.token_bytes(8))
