"""The catalogue: the models of one deployment, and the tasks that they serve.

Imports nothing of this project but config, nor Flask, Celery, Redis or torch.
"""

from catalogue.entries import (
    CHAT,
    COMPLETION,
    DETOKENIZE_PATH,
    EDIT,
    EMBEDDING,
    GENERATION,
    TASKS,
    TOKENIZE_PATH,
    ChatModelEntry,
    EmbeddingModelEntry,
    ImageModelEntry,
    ModelEntry,
    TaskSpec,
    TextModelEntry,
)
from catalogue.file import Catalogue
from catalogue.options import (
    ChatDefaults,
    ChatEngineOptions,
    EmbeddingDefaults,
    EmbeddingEngineOptions,
    EngineOptions,
    ImageDefaults,
    ImageEngineOptions,
    TextDefaults,
    TextEngineOptions,
)

__all__ = [
    "CHAT",
    "COMPLETION",
    "DETOKENIZE_PATH",
    "EDIT",
    "EMBEDDING",
    "GENERATION",
    "TASKS",
    "TOKENIZE_PATH",
    "Catalogue",
    "ChatDefaults",
    "ChatEngineOptions",
    "ChatModelEntry",
    "EmbeddingDefaults",
    "EmbeddingEngineOptions",
    "EmbeddingModelEntry",
    "EngineOptions",
    "ImageDefaults",
    "ImageEngineOptions",
    "ImageModelEntry",
    "ModelEntry",
    "TaskSpec",
    "TextDefaults",
    "TextEngineOptions",
    "TextModelEntry",
]
