"""Loads a model's processor: what makes pixels and tokens of images."""

from typing import Any

import transformers
from transformers import AutoImageProcessor, PreTrainedConfig
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from workers.engines.base import EngineLoadError


def load_processor(weights: str, config: PreTrainedConfig, source: dict[str, Any], tokenizer: Any) -> Any:
    """Load the processor of a folder or hub id, for text and images alone.

    `tokenizer` becomes the processor's own. `source`: arguments of `from_pretrained`. Raises EngineLoadError,
    or what transformers does.
    """
    name = PROCESSOR_MAPPING_NAMES.get(config.model_type)
    if name is None:
        raise EngineLoadError(f"transformers has no processor for {config.model_type}")
    cls = getattr(transformers, name)
    found = {
        "tokenizer": tokenizer,
        "image_processor": AutoImageProcessor.from_pretrained(weights, **source),
    }
    parts = [found.get(part) for part in cls.get_attributes()]
    options, _ = cls.get_processor_dict(weights, **source)
    options.pop("chat_template", None)
    return without_video(cls).from_args_and_dict(parts, options)


def without_video(cls: Any) -> Any:
    """Return a subclass of a processor's class that may lack the parts for videos and audio.

    transformers requires them, and for them packages that this service doesn't need.
    """
    # of the same name, by which transformers finds what belongs to it
    return type(cls.__name__, (_WithoutVideo, cls), {})


class _WithoutVideo:
    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        if argument is None:
            return type(None)
        return super().check_argument_for_proper_class(argument_name, argument)  # type: ignore[misc]
