"""The chat engine: continuous batching over `model.forward` with a paged KV cache. Start reading at engine.py."""

from workers.engines.chat.engine import ChatEngine

__all__ = ["ChatEngine"]
