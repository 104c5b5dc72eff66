"""Whether rows that are computed together get the logits that each gets alone."""

import torch

from benchmarks.gpu_check.context import Context, Loaded
from benchmarks.gpu_check.report import Outcome, Skipped, judged
from workers.engines.chat.sequence import Chunk

SIZES = (1, 2, 3, 4, 6, 8, 16, 32, 64)
"""Numbers of rows. Kernels divide their work by it, and graphs are recorded for some."""
PIECE = 512
"""Tokens of a prompt that are computed at once."""


def rows_together(context: Context) -> Outcome:
    """Compare decode steps of several rows, and of rows beside a piece of a prompt, with steps of one row."""
    loaded = context.loaded
    if context.reference is None:
        raise Skipped("there is no reference, so no rounding to judge by")
    limit, worst = context.reference.row_limit, dict[str, float]()
    rows = _Rows(loaded, context.work.longest_row)
    try:
        alone = torch.cat([rows.logits([row]) for row in rows.last])
        for count in rows.sizes:
            # once more in the opposite order: another row is the first, and the slots descend
            for numbers in (list(range(count)), list(range(len(rows.last)))[-count:][::-1]):
                found = rows.logits([rows.last[number] for number in numbers])
                key = f"{count} rows"
                worst[key] = max(worst.get(key, 0.0), _difference(found, alone[numbers]))
        numbers = [*range(min(8, len(rows.last) - 1)), len(rows.last) - 1]
        found = rows.logits([rows.last[number] for number in numbers[:-1]] + [rows.end_of_last()])
        worst["rows and a prompt"] = _difference(found, alone[numbers])
    finally:
        rows.release()
    wrong = [key for key, difference in worst.items() if not difference <= limit]
    figure = f"{'; '.join(wrong)} are wrong" if wrong else f"right for {', '.join(map(str, rows.sizes))}"
    figure += f"; largest difference {max(worst.values()):.1e} of the spread (limit {limit:.1e})"
    return judged(not wrong, figure, differences=worst, limit=limit, lengths=rows.lengths)


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest rms difference of a row, relative to the spread of its logits. NaN if any is NaN."""
    rms = (found - expected).square().mean(-1).sqrt()
    return float((rms / expected.std(-1)).max())


class _Rows:
    """Sequences of different lengths in the KV cache, each computed up to its last token."""

    def __init__(self, loaded: Loaded, longest: int) -> None:
        parts = loaded.engine.parts
        self._parts, cache = parts, parts.cache
        fitting = min(SIZES[-1], cache.num_free_slots, cache.num_pages // 2)
        self.sizes = [size for size in SIZES if size <= fitting]
        count = self.sizes[-1]
        # half of the longest on average, and a page that is not full
        room = 2 * (parts.kv_cache_tokens // count - cache.page_size)
        longest = min(longest, parts.max_context - 1, max(room, cache.page_size))
        self.lengths = [2 + (number * 37 % count + 1) * (longest - 2) // count for number in range(count - 1)]
        # the last one is the longest: a piece of it is computed beside rows
        self.lengths.append(longest)
        self._slots: list[int] = []
        self._tokens = [loaded.texts.tokens(length) for length in self.lengths]
        self.last: list[Chunk] = []
        for tokens in self._tokens:
            self._slots.append(cache.take_slot())
            cache.grow(self._slots[-1], len(tokens))
            self._prefill(self._slots[-1], tokens)
            self.last.append(Chunk(self._slots[-1], len(tokens) - 1, tokens[-1:], True))

    def _prefill(self, slot: int, tokens: list[int]) -> None:
        for start in range(0, len(tokens) - 1, PIECE):
            end = min(start + PIECE, len(tokens) - 1)
            self._parts.runner.forward([Chunk(slot, start, tokens[start:end], True)])

    def logits(self, chunks: list[Chunk]) -> torch.Tensor:
        """Logits float32 [chunks, vocabulary] on the CPU. Computing a token again changes nothing."""
        return self._parts.runner.forward(chunks).float().cpu().clone()

    def end_of_last(self) -> Chunk:
        """The last tokens of the last sequence, as a piece of a prompt."""
        tokens = self._tokens[-1]
        start = max(0, len(tokens) - 20)
        return Chunk(self._slots[-1], start, tokens[start:], True)

    def release(self) -> None:
        for slot in self._slots:
            self._parts.cache.release(slot)
