"""The image engine: diffusers pipelines that generate and edit images, several requests in one call."""

from workers.engines.images.engine import ImageEngine

__all__ = ["ImageEngine"]
