"""The chat engine: continuous batching with a paged KV cache. Start reading at engine.py."""

from workers.engines.chat.engine import ChatEngine

__all__ = ["ChatEngine"]
