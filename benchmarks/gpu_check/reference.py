"""What transformers' `generate` answers, with its logits, and how exact these are."""

import gc
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from benchmarks.gpu_check.texts import Texts
from catalogue import ChatModelEntry
from workers.engines.chat.model.tokens import sampled_tokens
from workers.engines.failures import free_memory

MARGIN = 8.0
"""Rounding explains another choice if the two logits differ by less than this multiple of the noise.

Each of the four logits that decide, two here and two in the engine, is wrong by about 0.7 of the noise.
"""

ROW_NOISE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.05}
"""How far two computations of one row may differ in any model: the rms, relative to the logits' spread."""
MOST_ROW_NOISE = 0.2
"""Attention that misses one key of 24 gives 0.24 or more, at every level of the model's own noise."""

COMPARED = 4
"""Number of answers from which the noise is measured."""


class Answer(NamedTuple):
    """One prompt, and what the model says to it."""

    content: str
    prompt: list[int]
    tokens: list[int]
    logits: torch.Tensor
    """[tokens, vocabulary] in the model's dtype, on the CPU."""


class Reference(NamedTuple):
    """`noise`: rms difference of logits between sdpa over a cache and eager attention over the whole text.

    `spread`: standard deviation of the logits.
    """

    answers: list[Answer]
    dtype: torch.dtype
    noise: float
    spread: float

    @property
    def largest_margin(self) -> float:
        """The largest difference of two logits that rounding explains."""
        return MARGIN * self.noise

    @property
    def row_limit(self) -> float:
        """The largest rms difference, relative to the spread, of a row's logits that rounding explains."""
        return min(max(3 * self.noise / self.spread, ROW_NOISE[self.dtype]), MOST_ROW_NOISE)


@torch.inference_mode()
def make_reference(
    entry: ChatModelEntry, device: torch.device, dtype: torch.dtype, count: int, new_tokens: int
) -> Reference:
    """Answer `count` prompts of different lengths, greedily and one by one. The model's memory is freed."""
    source: dict[str, Any] = {"revision": entry.revision, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(entry.weights, **source)
    model = AutoModelForCausalLM.from_pretrained(
        entry.weights, dtype=dtype, use_safetensors=True, device_map=device.type, **source
    ).eval()
    try:
        texts = Texts(tokenizer)
        rows = min(len(model.get_input_embeddings().weight), len(model.get_output_embeddings().weight))
        # only these settings: the model's own may have penalties and end tokens
        model.generation_config = GenerationConfig(
            do_sample=False,
            max_new_tokens=new_tokens,
            pad_token_id=0,
            # the engine never chooses the rows that only pad the embedding
            suppress_tokens=list(range(sampled_tokens(tokenizer, rows), rows)) or None,
            output_logits=True,
            return_dict_in_generate=True,
        )
        answers = [_answer(model, texts, 4 + 7 * number % 150) for number in range(count)]
        noise = _noise(model, answers[:COMPARED])
        spread = torch.stack([answer.logits.float().std() for answer in answers]).mean().item()
        return Reference(answers, dtype, noise, spread)
    finally:
        del model
        gc.collect()
        free_memory()


def _answer(model: Any, texts: Texts, tokens: int) -> Answer:
    content = texts.content(tokens)
    prompt = texts.prompt(content)
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(ids, attention_mask=torch.ones_like(ids))
    chosen: list[int] = out.sequences[0, len(prompt) :].tolist()
    return Answer(content, prompt, chosen, torch.cat(out.logits).to("cpu", model.dtype))


def _noise(model: Any, answers: list[Answer]) -> float:
    model.set_attn_implementation("eager")
    squares = []
    for answer in answers:
        ids = torch.tensor([answer.prompt + answer.tokens[:-1]], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, len(answer.prompt) - 1 :]
        squares.append((logits.float().cpu() - answer.logits.float()).square().mean())
    return torch.stack(squares).mean().sqrt().item()
