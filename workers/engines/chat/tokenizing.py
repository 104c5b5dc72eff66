"""Answers jobs for the tokenizer alone, in the thread that submits them."""

from protocol.errors import InvalidRequest
from protocol.events import Event, Finished, Text, Tokens
from protocol.jobs import DetokenizeJob, TokenizeJob
from workers.engines.chat.build import EngineParts


def answer(job: TokenizeJob | DetokenizeJob, parts: EngineParts) -> list[Event]:
    """Return the events of a job. Raises InvalidRequest."""
    if isinstance(job, DetokenizeJob):
        return [_text(job, parts), Finished()]
    return [_tokens(job, parts), Finished()]


def _tokens(job: TokenizeJob, parts: EngineParts) -> Tokens:
    if job.chat is None:
        ids = parts.prompts.encode(job.text, add_special_tokens=job.add_special_tokens)
    else:
        ids = parts.prompts.encode_chat(job.chat, add_generation_prompt=job.add_generation_prompt)
    pieces = parts.prompts.vocabulary.pieces
    return Tokens(ids, [pieces[token] for token in ids] if job.with_strings else None, parts.max_context)


def _text(job: DetokenizeJob, parts: EngineParts) -> Text:
    pieces = parts.prompts.vocabulary.pieces
    unknown = next((token for token in job.tokens if token not in pieces), None)
    if unknown is not None:
        raise InvalidRequest(f"the model's tokenizer has no token {unknown}", param="tokens")
    return Text(parts.prompts.decode(job.tokens))
