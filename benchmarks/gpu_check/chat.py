"""Checks of a loaded chat engine, without load: how it computes the model, and whether that is right."""

import logging
import time

import torch

from benchmarks.gpu_check.context import Context, Loaded, load_engine
from benchmarks.gpu_check.models import GIB, random_small
from benchmarks.gpu_check.reference import Reference, make_reference
from benchmarks.gpu_check.report import Outcome, Skipped, judged
from protocol.jobs import ChatJob, SamplingParams
from workers.engines.chat.attention.flash import FlashPagedAttention
from workers.engines.chat.model.cuda_graphs import CudaGraphs, recorded_sizes


def reference(context: Context) -> Outcome:
    """Make what the engine is compared with. It comes first: the engine takes all memory."""
    entry, work = context.entry, context.work
    started = time.monotonic()
    made = make_reference(entry, context.device, context.dtype, work.prompts, work.new_tokens)
    context.reference = made
    figure = (
        f"{entry.name}: {len(made.answers)} answers in {time.monotonic() - started:.0f} s;"
        f" rounding is {made.noise / made.spread:.1e} of the logits' spread"
    )
    return judged(made.noise < made.spread, figure, noise=made.noise, spread=made.spread)


def load(context: Context) -> Outcome:
    """Load the engine, which compares itself with the model."""
    started = time.monotonic()
    loaded = context.load()
    if context.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(context.device)
    seconds = time.monotonic() - started
    log = [record.getMessage() for record in loaded.log]
    return judged(True, f"{seconds:.1f} s: {loaded.engine.parts.describe()}", seconds=seconds, log=log)


def dtype(context: Context) -> Outcome:
    """Whether the weights have the dtype that suits the device."""
    found, right = context.loaded.engine.parts.precision.dtype, context.dtype
    figure = str(found).removeprefix("torch.")
    if found != right:
        figure += f", but {str(right).removeprefix('torch.')} is right for this device"
    return judged(found == right, figure, dtype=str(found))


def attention(context: Context) -> Outcome:
    """Whether FlashAttention is used where it can be."""
    parts, warnings = context.loaded.engine.parts, _warnings(context.loaded)
    name, kind = parts.attention.name, parts.cache.shape.dtype
    if context.device.type == "cpu":
        return judged(True, f"{name}: no GPU", attention=name)
    if isinstance(parts.attention, FlashPagedAttention):
        return judged(True, name, attention=name)
    if kind == torch.float32:
        return judged(True, f"{name}: FlashAttention has no float32", attention=name)
    if not warnings:
        return judged(True, f"{name}: the model has a softcap on scores", attention=name)
    return judged(False, f"{name}: {warnings[0]}", attention=name, warnings=warnings)


def graphs(context: Context) -> Outcome:
    """Whether decode steps were recorded."""
    loaded = context.loaded
    context.require_gpu()
    if not isinstance(loaded.engine.parts.attention, FlashPagedAttention):
        raise Skipped("only with FlashAttention")
    options = loaded.engine.entry.engine
    if not options.compile:
        raise Skipped("compile is false")
    if not isinstance(loaded.engine.parts.runner, CudaGraphs):
        return judged(False, "; ".join(_warnings(loaded)) or "none were recorded")
    sizes = recorded_sizes(options.max_batch_size)
    return judged(True, f"{len(sizes)} sizes: {', '.join(map(str, sizes))} rows", sizes=sizes)


def _warnings(loaded: Loaded) -> list[str]:
    return [record.getMessage() for record in loaded.log if record.levelno >= logging.WARNING]


def kv_cache(context: Context) -> Outcome:
    """The KV cache, and the memory that is left."""
    parts = context.loaded.engine.parts
    tokens, size = parts.kv_cache_tokens, parts.cache.pool.nbytes
    figure, values = f"{tokens:,} tokens, {size / GIB:.2f} GiB", {"tokens": tokens, "bytes": size}
    if context.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(context.device)
        figure += f"; {free / GIB:.1f} of {total / GIB:.1f} GiB are free"
        values |= {"free_bytes": free, "total_bytes": total}
    return judged(True, figure, **values)


def greedy(context: Context) -> Outcome:
    """Whether greedy answers, all at once, are those of transformers' `generate`."""
    if context.reference is None:
        raise Skipped("there is no reference")
    return compare(context.reference, context.loaded)


def greedy_in_float32(context: Context) -> Outcome:
    """The same for a small random model in float32, where rounding hides nothing."""
    context.require_gpu()
    entry = random_small(context.folder, dtype="float32", max_batch_size=64, kv_cache_tokens=65536)
    made = make_reference(entry, context.device, torch.float32, context.work.prompts, context.work.new_tokens)
    loaded = load_engine(entry)
    try:
        return compare(made, loaded)
    finally:
        loaded.engine.close()


def compare(made: Reference, loaded: Loaded) -> Outcome:
    """Let the engine answer the reference's prompts, all at once.

    Where an answer first differs, the logits of the two tokens must be equal but for rounding.
    """
    engine, recorder = loaded.engine, loaded.recorder
    jobs = [
        ChatJob(
            id=recorder.new_id(),
            model=engine.entry.name,
            messages=[{"role": "user", "content": answer.content}],
            sampling=SamplingParams(
                max_tokens=len(answer.tokens), temperature=0.0, repetition_penalty=1.0, ignore_eos=True
            ),
        )
        for answer in made.answers
    ]
    for job in jobs:
        engine.submit(job)
    recorder.wait_ended(engine, [job.id for job in jobs])
    if failed := recorder.failures():
        return judged(False, f"{len(failed)} requests failed: {failed[0].message}")
    margins = []
    for job, answer in zip(jobs, made.answers, strict=True):
        request = recorder.requests[job.id]
        if request.prompt != answer.prompt:
            return judged(False, "the engine's prompts are not those of the chat template")
        found = request.sequences[0].output
        if len(found) != len(answer.tokens):
            return judged(False, f"an answer has {len(found)} tokens instead of {len(answer.tokens)}")
        differing = (at for at, token in enumerate(found) if token != answer.tokens[at])
        if (at := next(differing, None)) is not None:
            logits = answer.logits[at].float()
            margins.append((logits[answer.tokens[at]] - logits[found[at]]).item())
    equal, worst = len(jobs) - len(margins), max(margins, default=0.0)
    figure = f"{equal} of {len(jobs)} answers are equal"
    if margins:
        figure += f"; the others differ where two logits do by up to {worst:.2g} (rounding: {made.largest_margin:.2g})"
    return judged(
        worst <= made.largest_margin, figure, equal=equal, margins=margins, limit=made.largest_margin
    )
