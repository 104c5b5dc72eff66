"""Lets a pipeline load only components whose weights are complete."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import ModelMixin
from transformers import PreTrainedModel

from workers.engines.checkpoint import refuse_incomplete


@contextmanager
def complete_components() -> Iterator[None]:
    """Make each component that is loaded inside this block raise EngineLoadError if its weights are
    incomplete.

    A pipeline loads its components by their `from_pretrained` and drops the reports on missing weights, which
    are then random numbers. Not for several threads at once.
    """
    bases: list[Any] = [PreTrainedModel, ModelMixin]
    originals = [base.__dict__["from_pretrained"] for base in bases]
    try:
        for base, original in zip(bases, originals, strict=True):
            base.from_pretrained = classmethod(_complete(original.__func__))
        yield
    finally:
        for base, original in zip(bases, originals, strict=True):
            base.from_pretrained = original


def _complete(load: Any) -> Any:
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        reports = kwargs.pop("output_loading_info", False)
        if issubclass(cls, PreTrainedModel):
            # refused below, with the names of the weights
            kwargs["ignore_mismatched_sizes"] = True
        model, info = load(cls, *args, output_loading_info=True, **kwargs)
        # diffusers reports buffers too, which a model computes when it is created
        missing = set(info["missing_keys"]) & {name for name, _ in model.named_parameters()}
        refuse_incomplete({**info, "missing_keys": missing}, cls.__name__)
        return (model, info) if reports else model

    return from_pretrained
