"""Finds weights that are complete and have the right shapes, but are not those of a working model.

Such a model generates without any error, and every comparison of it with itself agrees.
"""

import math
from typing import Any

import torch

from workers.engines.base import EngineLoadError
from workers.engines.chat.model.loader import LoadedModel, first_line

TEXT = "Hello! How are you today? I am fine, thank you. Who are you? I am a small language model."

SHARE = 0.1
"""Smallest mean log probability of a trained model above that of equally probable tokens, as a share of log
V.

V is the size of the vocabulary. SmolLM2-135M reaches 0.7, and the demo model, which knows a few dialogues
only, 0.5. With the embedding or the first layer's MLP shuffled, or the rows moved by one, they stay below
0.07. Other products do not show: the other layers make up for them.
"""


@torch.inference_mode()
def refuse_nonsense(loaded: LoadedModel) -> None:
    """Raise EngineLoadError for logits that are not finite, or if a plain English text is improbable.

    Models with random weights, as tests and benchmarks use, may find any text improbable.
    """
    ids = _ids(loaded)
    try:
        logits = loaded.model(input_ids=ids[None], use_cache=False).logits[0].float()
    except (ValueError, TypeError, AttributeError, RuntimeError, IndexError) as error:
        raise EngineLoadError(f"{loaded.architecture} can't be served: {first_line(error)}") from error
    if not bool(logits.isfinite().all()):
        raise EngineLoadError("the weights are damaged: the model's logits are not finite")
    if len(ids) < 2 or not _is_trained(loaded.model):
        return
    uniform = -math.log(logits.shape[-1])
    mean = float(logits[:-1].log_softmax(-1).gather(1, ids[1:, None]).mean())
    if mean < uniform * (1 - SHARE):
        raise EngineLoadError(
            f"the weights are damaged or another model's tokenizer is beside them: plain English"
            f" has a log probability of {mean:.1f} for each token, and random tokens have {uniform:.1f}"
        )


def _ids(loaded: LoadedModel) -> torch.Tensor:
    """Return the tokens of TEXT, after the token for a beginning if there is one: int64 [tokens]."""
    tokenizer = loaded.tokenizer
    rows = loaded.model.get_input_embeddings().weight.shape[0]
    text = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = [token for token in start + text if token < rows][: loaded.max_context]
    return torch.tensor(ids, dtype=torch.int64, device=loaded.device)


def _is_trained(model: Any) -> bool:
    """Whether any norm has different weights: in a model with random weights they are all equal."""
    norms = [module for module in model.modules() if "Norm" in type(module).__name__]
    weights = [parameter for norm in norms for parameter in norm.parameters()]
    return any(bool((weight != weight[0]).any()) for weight in weights)
