"""How many tokens of waiting prompts a step computes beside the running sequences."""

import pytest
import torch

from workers.engines.chat.cache.kv_cache import CacheShape, KVCache
from workers.engines.chat.detokenizer import Detokenizer, WindowStream
from workers.engines.chat.scheduler import SMALLEST_CHUNK, STALL, BatchScheduler, ScheduledBatch
from workers.engines.chat.sequence import Request, Sampling, Sequence

OVERHEAD = 20.0
PROMPT = 40


def sequence(name: str, tokens: int = PROMPT) -> Sequence:
    request = Request(name, list(range(tokens)), Sampling(max_tokens=100))
    request.sequences.append(Sequence(request, 0, Detokenizer(WindowStream(lambda tokens: ""))))
    return request.sequences[0]


def scheduler(running: int, pages: int = 2000, slots: int = 64) -> BatchScheduler:
    """Make a scheduler with `running` sequences that decode."""
    shape = CacheShape(1, 1, 2, torch.float32, token_major=False)
    made = BatchScheduler(KVCache(shape, pages, 8, slots, torch.device("cpu")), None, max_prefill=512)
    made.step_overhead = OVERHEAD
    for number in range(running):
        made.add(sequence(f"r{number}"))
    while made.waiting:
        made.schedule()
        for one in made.running:
            one.computed = one.length
    for one in made.running:
        one.append(1)
    return made


def prompt_tokens(batch: ScheduledBatch) -> int:
    return sum(count for _, count in batch.prefill)


@pytest.mark.parametrize("running", [1, 8, 40])
def test_one_long_prompt_lengthens_a_step_by_no_more_than_its_share(running: int) -> None:
    made = scheduler(running)
    made.add(sequence("long", 2000))
    batch = made.schedule()
    assert len(batch.decode) == running
    assert prompt_tokens(batch) == int(STALL * (OVERHEAD + running))


def test_a_few_streams_do_not_hold_back_the_first_tokens_of_many() -> None:
    made = scheduler(4)
    for number in range(56):
        made.add(sequence(f"w{number}"))
    first = prompt_tokens(made.schedule())
    assert first == pytest.approx(STALL * (OVERHEAD + 4) * 56 / 4, abs=PROMPT)


def test_the_budget_is_small_again_once_most_sequences_decode() -> None:
    made = scheduler(40)
    for number in range(20):
        made.add(sequence(f"w{number}"))
    assert prompt_tokens(made.schedule()) < STALL * (OVERHEAD + 40) + SMALLEST_CHUNK


def test_sequences_without_pages_lengthen_no_step() -> None:
    made = scheduler(7, pages=8 * 6 + 12)
    for number in range(56):
        made.add(sequence(f"w{number}"))
    assert prompt_tokens(made.schedule()) < STALL * (OVERHEAD + 8) + SMALLEST_CHUNK


def test_sequences_without_a_slot_lengthen_no_step() -> None:
    made = scheduler(7, slots=8)
    made.add(sequence("long", 2000))
    for one, count in made.schedule().prefill:
        one.computed += count
    for number in range(56):
        made.add(sequence(f"w{number}"))
    assert 0 < prompt_tokens(made.schedule()) < STALL * (OVERHEAD + 8) + SMALLEST_CHUNK
