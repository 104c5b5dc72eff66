"""Checks of the chat engine under load: waits for the device, speed, memory."""

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check.context import Context
from benchmarks.gpu_check.models import GIB
from benchmarks.gpu_check.report import Outcome, judged
from benchmarks.gpu_check.streams import Streams

WAIT = "called a synchronizing CUDA operation"
"""How torch's warning begins."""
WAITING_STREAMS = 64
SAMPLED = {"temperature": 0.8, "top_p": 0.9, "seed": 1}


def _streams(context: Context, count: int, **sampling: Any) -> Streams:
    loaded, work = context.loaded, context.work
    prompt = min(work.prompt_tokens, loaded.engine.parts.max_context // 8)
    return Streams(loaded.engine, loaded.recorder, loaded.texts, count, prompt, work.window, **sampling)


def waits(context: Context) -> Outcome:
    """How often the host waits for the device in a decode step, greedy and sampled."""
    context.require_gpu()
    engine = context.loaded.engine
    count = min(WAITING_STREAMS, engine.entry.engine.max_batch_size)
    with counted_waits() as known:
        torch.ones(1, device=context.device).item()
    if known.total() != 1:
        return judged(False, f"torch reports {known.total()} waits where there is one")
    each: dict[str, float] = {}
    places: dict[str, Counter[str]] = {}
    for name, sampling in (("greedy", {}), ("sampled", SAMPLED)):
        with _streams(context, count, **sampling) as streams:
            with counted_waits() as found:
                before = engine.metrics.steps
                streams.wait_more(context.work.window)
                steps = engine.metrics.steps - before
        each[name], places[name] = found.total() / steps, found
    figure = ", ".join(f"{name} {number:.2f}" for name, number in each.items()) + f" a step of {count} rows"
    # the first and the last step are counted in part
    return judged(all(number < 1.1 for number in each.values()), figure, waits=each, places=places)


@contextmanager
def counted_waits() -> Iterator[Counter[str]]:
    """Count the operations that wait for the device, in all threads, by file and line.

    The counter is filled when the block ends.
    """
    places: Counter[str] = Counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if str(warning.message).startswith(WAIT):
            places[f"{Path(warning.filename).name}:{warning.lineno}"] += 1


def speed(context: Context, count: int) -> Outcome:
    """Tokens per second while `count` streams run, and the time to their first tokens."""
    with _streams(context, count) as streams:
        found = streams.speed()
    figure = (
        f"{found.tokens_per_s:,.0f} tokens/s at {found.mean_context:,.0f} tokens of context;"
        f" first token after {found.first_token_ms:,.0f} ms, at most {found.last_first_token_ms:,.0f} ms"
    )
    return judged(True, figure, streams=count, **found._asdict())


def peak_memory(context: Context) -> Outcome:
    """Whether the memory in use stayed below all there is, since the load."""
    loaded = context.loaded
    context.require_gpu()
    free, total = torch.cuda.mem_get_info(context.device)
    # the context's own memory, the driver's, and that of other processes
    others = total - free - torch.cuda.memory_reserved(context.device)
    peak = torch.cuda.max_memory_reserved(context.device) + others
    figure = (
        f"{peak / GIB:.1f} of {total / GIB:.1f} GiB at the peak, {others / GIB:.1f} GiB of it outside torch"
    )
    preemptions = loaded.engine.metrics.preemptions
    return judged(peak < total, figure, peak_bytes=peak, total_bytes=total, preemptions=preemptions)


def out_of_memory(context: Context) -> Outcome:
    """Whether any request failed, or torch ever ran out of memory, since the process began."""
    failed = context.loaded.recorder.failures()
    figure, values = f"{len(failed)} requests failed", {"failed": len(failed), "ooms": 0, "retries": 0}
    if context.device.type == "cuda":
        stats = torch.cuda.memory_stats(context.device)
        values |= {"ooms": stats.get("num_ooms", 0), "retries": stats.get("num_alloc_retries", 0)}
        figure += (
            f"; memory ran out {values['ooms']} times, and caches were emptied {values['retries']} times"
        )
    return judged(not failed and not values["ooms"], figure, **values)
