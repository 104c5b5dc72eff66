"""Composes a loaded model and everything around it into an engine's parts, warmed up and measured."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from catalogue import ChatEngineOptions, TextEngineOptions, TextModelEntry
from workers.engines.chat.attention.base import ModelAttention
from workers.engines.chat.backend import Backend, build_backend
from workers.engines.chat.cache.kv_cache import KVCache
from workers.engines.chat.cache.prefix_cache import PrefixCache
from workers.engines.chat.end_tokens import end_tokens
from workers.engines.chat.grammar.filler import MaskFiller
from workers.engines.chat.metrics import Metrics
from workers.engines.chat.model.cuda_graphs import CudaGraphs
from workers.engines.chat.model.likelihood import refuse_nonsense
from workers.engines.chat.model.loader import LoadedModel, in_one_line, load_model
from workers.engines.chat.model.precision import Precision
from workers.engines.chat.model.runner import Runner
from workers.engines.chat.model.split_runner import TOKEN_S, SplitRunner, StepCosts
from workers.engines.chat.model.tokens import refuse_foreign_tokenizer, sampled_tokens
from workers.engines.chat.outputs import RequestOutputs
from workers.engines.chat.pipeline import DecodePipeline
from workers.engines.chat.prompt import PromptBuilder
from workers.engines.chat.sampling.sampler import Sampler
from workers.engines.chat.sampling.scoring import max_scored
from workers.engines.chat.scheduler import BatchScheduler
from workers.engines.chat.sequence import Chunk
from workers.engines.chat.speculation import NgramDrafter
from workers.engines.chat.vision.vision import Vision, warn_blind
from workers.engines.device import available_cores, default_threads
from workers.engines.failures import free_memory
from workers.engines.huge_pages import use_huge_pages

PREFILL_CHUNK = {"cpu": 512, "cuda": 2048}
"""Prompt tokens of a step without `prefill_chunk`. A GPU computes fewer hardly faster."""


MAX_MASK_THREADS = 16


@dataclass(slots=True)
class EngineParts:
    """The engine's collaborators."""

    precision: Precision
    cache: KVCache
    attention: ModelAttention
    runner: Runner
    scheduler: BatchScheduler
    sampler: Sampler
    prompts: PromptBuilder
    masks: MaskFiller
    outputs: RequestOutputs
    drafter: NgramDrafter | None
    pipeline: DecodePipeline | None
    max_context: int
    sampled_tokens: int
    """Number of ids, from 0, that are tokens."""
    torch_threads: int

    @property
    def kv_cache_tokens(self) -> int:
        """The number of tokens that the KV cache holds."""
        return self.cache.num_pages * self.cache.page_size

    def describe(self) -> str:
        """One line for the log: device, dtype of the weights, attention, CUDA graphs, sizes."""
        device = self.cache.pool.device
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        graphs = "CUDA graphs" if isinstance(self.runner, CudaGraphs) else "no CUDA graphs"
        return (
            f"{where}, {self.precision.describe()}, attention by {self.attention.name}, {graphs},"
            f" KV cache of {self.kv_cache_tokens} tokens, context of {self.max_context} tokens"
        )

    def free(self) -> None:
        """Return the memory of weights and cache. The parts can't be used afterwards."""
        self.attention.unregister()
        self.pipeline = None
        if isinstance(self.runner, SplitRunner):
            self.runner.close()
        self.masks.close()
        self.prompts.free()
        del self.attention, self.runner, self.cache.pool
        free_memory()


def build_engine(
    entry: TextModelEntry, gpu_share: float, metrics: Metrics, on_end: Callable[[str], None]
) -> EngineParts:
    """Load the model and warm it up. Raises EngineLoadError.

    `gpu_share`: the part of the GPU's memory that this process may use. `on_end` is called with the id of
    each request that has ended.
    """
    with in_one_line(entry):
        return _build(entry, gpu_share, metrics, on_end)


def _build(
    entry: TextModelEntry, gpu_share: float, metrics: Metrics, on_end: Callable[[str], None]
) -> EngineParts:
    options = entry.engine
    torch_threads = options.torch_threads or default_threads()
    torch.set_num_threads(torch_threads)
    halves = (options.torch_threads or available_cores()) == 2
    loaded = load_model(entry)
    # before the weights are packed: some of the model's parameters are then gone
    attention_cost = _attention_cost(loaded)
    rows = loaded.model.get_input_embeddings().weight.shape[0]
    vocabulary = loaded.model.get_output_embeddings().weight.shape[0]
    end = end_tokens(loaded.model.generation_config, loaded.text_config, loaded.tokenizer)
    refuse_foreign_tokenizer(loaded, rows, end)
    refuse_nonsense(loaded)
    prefill_chunk = options.prefill_chunk or PREFILL_CHUNK[loaded.device.type]
    backend = build_backend(loaded, options, prefill_chunk=prefill_chunk, gpu_share=gpu_share, halves=halves)
    cache = backend.cache
    if isinstance(backend.runner, SplitRunner):
        torch_threads = 1
        torch.set_num_threads(torch_threads)
    vision = _checked_vision(loaded, backend, metrics)
    if loaded.device.type == "cpu":
        # the weights are packed now, and passes are measured next
        use_huge_pages()
    max_context = min(loaded.max_context, cache.num_pages * cache.page_size)
    prefixes = PrefixCache(cache) if options.prefix_cache else None
    scheduler = BatchScheduler(cache, prefixes, prefill_chunk, attention_cost, max_scored(vocabulary))
    scheduler.step_overhead, token_s = _measure_passes(backend, min(prefill_chunk, max_context - 1))
    if isinstance(backend.runner, SplitRunner):
        costs = StepCosts(scheduler.step_overhead, attention_cost, TOKEN_S / token_s)
        backend.runner.set_costs(costs)
    prompts = _build_prompts(loaded, options, rows, vocabulary, max_context, vision)
    # a sampled token is also the next step's input
    sampled = sampled_tokens(loaded.tokenizer, min(rows, vocabulary))
    sampler = Sampler(vocabulary, options.max_batch_size, loaded.device, sampled)
    # on a CPU nothing is computed while the host goes on
    pipelined = loaded.device.type == "cuda" and not options.num_speculative_tokens
    return EngineParts(
        precision=loaded.precision,
        cache=cache,
        attention=backend.attention,
        runner=backend.runner,
        scheduler=scheduler,
        sampler=sampler,
        pipeline=DecodePipeline(cache, scheduler, backend.runner, sampler) if pipelined else None,
        prompts=prompts,
        masks=MaskFiller(
            prompts.grammars.words, _mask_threads(torch_threads), late=loaded.device.type == "cpu"
        ),
        outputs=RequestOutputs(scheduler, prompts.vocabulary, metrics, on_end),
        drafter=NgramDrafter(cache, options.num_speculative_tokens, options.max_batch_size)
        if options.num_speculative_tokens
        else None,
        max_context=max_context,
        sampled_tokens=sampled,
        torch_threads=torch_threads,
    )


def _build_prompts(
    loaded: LoadedModel,
    options: TextEngineOptions,
    rows: int,
    vocabulary: int,
    max_context: int,
    vision: Vision | None,
) -> PromptBuilder:
    """`rows`: of the embedding. `vocabulary`: number of logits."""
    if not isinstance(options, ChatEngineOptions):
        # a model that takes no messages need not tell its control tokens from their text
        options = ChatEngineOptions(tool_format="none", control_tokens_in_content=True)
    return PromptBuilder(
        loaded.tokenizer,
        loaded.model.generation_config,
        rows,
        max_context,
        config=loaded.text_config,
        tool_format=options.tool_format,
        control_tokens_in_content=options.control_tokens_in_content,
        logits_size=vocabulary,
        vision=vision,
    )


def _checked_vision(loaded: LoadedModel, backend: Backend, metrics: Metrics) -> Vision | None:
    """Return the model's sight, if what the backend computes for an image is the model's own output."""
    vision = loaded.vision
    if vision is None:
        return None
    vision.encoder.on_progress = metrics.count_image_layer
    if (reason := vision.refusal(backend.runner, backend.cache)) is not None:
        warn_blind(loaded.name, loaded.architecture, reason)
        return None
    return vision


def _mask_threads(torch_threads: int) -> int:
    """Masks are filled while the model computes: with the cores that it leaves."""
    cores = available_cores()
    return min(max(1, cores if torch.cuda.is_available() else cores - torch_threads), MAX_MASK_THREADS)


def _attention_cost(loaded: LoadedModel) -> float:
    """The cost of attending to one key, relative to the cost of a token's pass through all weights.

    Counted in arithmetic operations and doubled: attention's small products run at half the speed of the
    large ones.
    """
    text = loaded.text_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    of_one_key = 4 * text.num_hidden_layers * text.num_attention_heads * head_dim
    of_weights = 2 * sum(parameter.numel() for parameter in loaded.model.parameters())
    return 2 * of_one_key / of_weights


def _measure_passes(backend: Backend, chunk: int) -> tuple[float, float]:
    """Measure passes over one and over `chunk` tokens.

    Returns the fixed cost of a forward pass, in tokens, and the seconds of each token.
    """
    cache = backend.cache

    def seconds(tokens: int) -> float:
        slot = cache.take_slot()
        try:
            cache.grow(slot, tokens)
            times: list[float] = []
            # short ones more often: a single one may be delayed by other processes
            while len(times) < 3 or (len(times) < 10 and sum(times) < 0.2):
                started = time.perf_counter()
                backend.runner.forward([Chunk(slot, 0, [0] * tokens, True)]).sum().item()
                times.append(time.perf_counter() - started)
        finally:
            cache.release(slot)
        return min(times)

    one, many = seconds(1), seconds(chunk)
    each = max((many - one) / max(1, chunk - 1), 1e-9)
    return min(max(0.0, one / each - 1), 4096.0), each
