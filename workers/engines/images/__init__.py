"""The picture engine: diffusers pipelines that draw and edit, several requests in one call."""

from workers.engines.pictures.engine import PictureEngine

__all__ = ["PictureEngine"]
