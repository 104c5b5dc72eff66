"""The picture engine: diffusers pipelines that draw and edit, several requests in one call."""

from workers.engines.images.engine import ImageEngine

__all__ = ["ImageEngine"]
