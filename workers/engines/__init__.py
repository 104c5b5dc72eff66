"""Engines: loaded models that work on jobs. torch, transformers and diffusers are imported below here alone, and late."""

from catalogue import ChatModelEntry, ImageModelEntry, ModelEntry
from workers.engines.base import Engine
from workers.engines.echo import PREFIX, EchoEngine


def create_engine(entry: ModelEntry) -> Engine:
    """The engine for a catalogue entry, not yet loaded."""
    if entry.weights.startswith(PREFIX):
        return EchoEngine(entry)
    # imported here: Flower and the command line load this package too, and must not load torch
    match entry:
        case ChatModelEntry():
            from workers.engines.chat import ChatEngine

            return ChatEngine(entry)
        case ImageModelEntry():
            from workers.engines.images import ImageEngine

            return ImageEngine(entry)
    raise TypeError(f"no engine serves a {type(entry).__name__}")
