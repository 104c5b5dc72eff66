"""The embedding engine: many inputs in a pass through a transformer. Start reading at engine.py."""

from workers.engines.embedding.engine import EmbeddingEngine

__all__ = ["EmbeddingEngine"]
