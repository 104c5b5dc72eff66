"""Engines: loaded models that work on jobs. torch, transformers and diffusers are imported below here alone, and late."""

from catalogue import ModelEntry
from workers.engines.base import Engine
from workers.engines.echo import PREFIX, EchoEngine


def create_engine(entry: ModelEntry) -> Engine:
    """The engine for a catalogue entry, not yet loaded."""
    if entry.weights.startswith(PREFIX):
        return EchoEngine(entry)
    # imported here: a process that only looks (Flower, the command line) must not pay for torch
    if entry.is_chat:
        from workers.engines.chat import ChatEngine

        return ChatEngine(entry)
    from workers.engines.images import ImageEngine

    return ImageEngine(entry)
