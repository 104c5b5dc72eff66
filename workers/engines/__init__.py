"""Engines: loaded models that work on jobs. torch and other large libraries are imported when one is created."""

from catalogue import ChatModelEntry, ImageModelEntry, ModelEntry
from workers.engines.base import Engine
from workers.engines.echo import PREFIX, EchoEngine


def create_engine(entry: ModelEntry) -> Engine:
    """Make the engine for a catalogue entry. The caller loads it."""
    if entry.weights.startswith(PREFIX):
        return EchoEngine(entry)
    # Imported here, because Flower and the command line import this package and must not import torch.
    match entry:
        case ChatModelEntry():
            from workers.engines.chat import ChatEngine

            return ChatEngine(entry)
        case ImageModelEntry():
            from workers.engines.images import ImageEngine

            return ImageEngine(entry)
    raise TypeError(f"no engine serves a {type(entry).__name__}")
