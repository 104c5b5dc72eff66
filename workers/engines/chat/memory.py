"""Divides the memory that a loaded model leaves between the KV cache and everything that a step needs
besides."""

from collections.abc import Callable

import torch

from catalogue import TextEngineOptions
from workers.engines.base import TemporaryLoadError
from workers.engines.chat.attention.base import ModelAttention
from workers.engines.chat.cache.kv_cache import CacheShape, KVCache
from workers.engines.chat.detokenizer import Detokenizer, WindowStream
from workers.engines.chat.model.fused_decoder import FusedDecoder, JoinedWeights
from workers.engines.chat.model.layers import LayerOperations
from workers.engines.chat.model.loader import LoadedModel, cache_shape
from workers.engines.chat.model.runner import ModelForward, ModelRunner
from workers.engines.chat.sampling.sampler import Sampler
from workers.engines.chat.sampling.scoring import max_scored, score_on_device
from workers.engines.chat.sequence import Chunk, Request, Sampling, Sequence
from workers.engines.load_errors import memory_of_own, no_room

CPU_CACHE_FRACTION = 0.1
"""Share of the machine's memory without `kv_cache_tokens`: several workers may run on one machine."""

LEAST_TOKENS = 64
"""The smallest KV cache without `kv_cache_tokens`."""


class CacheFactory:
    """Makes the KV cache of a model, as large as the memory permits."""

    def __init__(
        self,
        loaded: LoadedModel,
        joined: list[JoinedWeights] | None,
        options: TextEngineOptions,
        prefill_chunk: int,
        gpu_share: float,
    ) -> None:
        """`joined`: the layers' joined weights, if FusedDecoder can run the model.

        `prefill_chunk`: the largest number of prompt tokens in a step.

        `gpu_share`: the part of the GPU's memory that this process may use.
        """
        self._loaded = loaded
        self._joined = joined
        self._options = options
        self._prefill_chunk = prefill_chunk
        self._gpu_share = gpu_share

    def make(
        self, page: int, attention_over: Callable[[KVCache], ModelAttention], *, token_major: bool
    ) -> KVCache:
        """Make the cache, with `page` tokens a page. Raises EngineLoadError.

        On a GPU the largest steps are first run with a small cache, to see what memory they need.
        """
        loaded, shape = self._loaded, cache_shape(self._loaded, token_major)
        reserve = 0
        if loaded.device.type == "cuda":
            trial = self._pages(shape, self._prefill_chunk // page + 2, page)
            reserve = step_bytes(
                loaded, self._joined, attention_over(trial), trial, self._options, self._prefill_chunk
            )
            del trial
        tokens = budget_tokens(loaded, shape, self._options, gpu_share=self._gpu_share, reserve=reserve)
        return self._pages(shape, max(2, tokens // page), page)

    def _pages(self, shape: CacheShape, count: int, page: int) -> KVCache:
        loaded = self._loaded
        try:
            return KVCache(shape, count, page, self._options.max_batch_size, loaded.device)
        except (RuntimeError, MemoryError) as error:
            message = f"no room for a KV cache of {count * page} tokens"
            needed = count * page * shape.bytes_per_token
            raise no_room(message, needed=needed, room=memory_of_own(loaded.device)) from error


def step_bytes(
    loaded: LoadedModel,
    joined: list[JoinedWeights] | None,
    attention: ModelAttention,
    cache: KVCache,
    options: TextEngineOptions,
    chunk: int,
) -> int:
    """Return the memory of a GPU that the largest steps need besides weights and cache, in bytes.

    These are a decode step of a full batch, sampled in every way, and then, as the sampler keeps counts of
    tokens, a prefill of `chunk` tokens beside decode rows, and one of a prompt that is scored. All run
    through the model's own layers, and with `joined` weights through FusedDecoder. CUDA graphs have memory of
    their own for the decode step. A model that takes images also needs the memory for the largest one.
    """
    runner = ModelRunner(ModelForward(loaded.model), attention, loaded.device)
    loaded.model.set_attn_implementation(attention.register())
    slot = cache.take_slot()
    tokens = min(chunk, loaded.max_context - 1)
    padding = Chunk(cache.padding_slot, 0, [0], True)
    rows = [_sampled_in_every_way(at) for at in range(options.max_batch_size)]

    vocabulary = loaded.model.get_output_embeddings().weight.shape[0]

    def decode(sampler: Sampler) -> None:
        sampler.sample(runner.forward([padding] * len(rows)), rows)

    def prefill() -> None:
        runner.forward([padding] * (len(rows) - 1) + [Chunk(slot, 0, [0] * tokens, True)])
        prompt = [0] * min(tokens, max_scored(vocabulary))
        score_on_device(runner.forward([Chunk(slot, 0, prompt, True, True)]), prompt, 20, vocabulary)

    def steps() -> None:
        sampler = Sampler(vocabulary, len(rows), loaded.device)
        decode(sampler)
        prefill()
        if joined is not None:
            # Triton's kernels need less than torch's operations
            operations = LayerOperations(loaded.model, attention, loaded.max_context)
            runner.model_forward = FusedDecoder(loaded.model, joined, attention, operations)
            decode(sampler)
            prefill()

    def recorded() -> None:
        decode(Sampler(vocabulary, len(rows), loaded.device))

    try:
        cache.grow(slot, tokens)
        graphs = peak_bytes(recorded, loaded.device) if options.compile else 0
        # an image is computed before the step that needs it
        return graphs + max(_image_bytes(loaded), peak_bytes(steps, loaded.device))
    finally:
        cache.release(slot)
        attention.unregister()


def _image_bytes(loaded: LoadedModel) -> int:
    """Return the memory of a GPU that the largest image needs.

    Raises TemporaryLoadError if it has not so much.
    """
    if loaded.vision is None:
        return 0
    try:
        return peak_bytes(loaded.vision.compute_largest, loaded.device)
    except torch.OutOfMemoryError as error:
        message = "no room for the largest image beside the weights; it is smaller with less max_image_pixels"
        raise TemporaryLoadError(message) from error


def _sampled_in_every_way(slot: int) -> Sequence:
    sampling = Sampling(
        max_tokens=1, temperature=1.0, top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.1, logprobs=20
    )
    return Sequence(Request("", [0], sampling), 0, Detokenizer(WindowStream(lambda tokens: "")), slot=slot)


def budget_tokens(
    loaded: LoadedModel, shape: CacheShape, options: TextEngineOptions, *, gpu_share: float, reserve: int
) -> int:
    """Return the number of tokens that the KV cache may hold: at most what a full batch can use.

    `gpu_share`: the part of the GPU that this process may use. `reserve`: bytes of it that steps need
    besides. Raises EngineLoadError.
    """
    most = options.max_batch_size * loaded.max_context
    if options.kv_cache_tokens is not None:
        return min(most, options.kv_cache_tokens)
    room = memory_of_own(loaded.device)
    if loaded.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(loaded.device)
        held = torch.cuda.memory_reserved(loaded.device)
        free = min(free, int(total * gpu_share) - held)
        room, share = int(total * gpu_share) - held - reserve, options.memory_fraction
    else:
        free, share = room, CPU_CACHE_FRACTION
    tokens = int((free - reserve) * share) // shape.bytes_per_token
    if tokens < LEAST_TOKENS:
        besides = f" besides the {reserve / 2**20:.0f} MiB that a step needs" if reserve else ""
        message = (
            f"no memory is left for a KV cache of {LEAST_TOKENS} tokens{besides}:"
            f" {max(0, free) / 2**20:.0f} MiB are free"
        )
        raise no_room(message, needed=LEAST_TOKENS * shape.bytes_per_token, room=int(room * share))
    return min(most, tokens)


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Return the memory of a GPU that `run` needs for a time, in bytes."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
