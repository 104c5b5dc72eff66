"""The sampling parameters of running sequences by slot, and the uniform number of each token."""

import numpy as np

from workers.engines.chat.sequence import Sequence

_MASK64 = (1 << 64) - 1

ROW = np.dtype(
    [
        ("slot", np.int64),
        ("greedy", np.bool_),
        ("temperature", np.float32),
        ("top_k", np.float32),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("penalised", np.bool_),
        ("repetition_penalty", np.float32),
        ("presence_penalty", np.float32),
        ("frequency_penalty", np.float32),
        ("biased", np.bool_),
        ("min_tokens", np.int64),
        ("logprobs", np.int64),
        ("seed_state", np.uint64),
    ],
    # torch wants strides that are multiples of the elements' size
    align=True,
)
"""One row's parameters. min_tokens is 0 without stop ids and with a grammar, logprobs -1 if none are
wanted."""


class SlotParameters:
    """What each running sequence asks for, as arrays: a step reads all its rows at once.

    A slot is written when a sequence is first sampled in it.
    """

    def __init__(self, slots: int) -> None:
        self._table = np.zeros(slots, ROW)
        self._owners: list[Sequence | None] = [None] * slots

    def of(self, rows: list[Sequence], slots: list[int]) -> np.ndarray:
        """Return ROW [rows]. slots: those of the rows."""
        owners = self._owners
        for row, slot in zip(rows, slots, strict=True):
            if owners[slot] is not row:
                self._table[slot] = _values(row)
                owners[slot] = row
        return self._table[slots]


def _values(row: Sequence) -> tuple[float, ...]:
    own = row.sampling
    return (
        row.slot,
        own.greedy,
        own.temperature,
        own.top_k,
        own.top_p,
        own.min_p,
        own.penalised,
        own.repetition_penalty,
        own.presence_penalty,
        own.frequency_penalty,
        bool(own.logit_bias),
        # a row with a grammar: grammar/ends.py
        own.min_tokens if own.stop_token_ids and row.grammar is None else 0,
        -1 if own.logprobs is None else own.logprobs,
        seed_states([own.seed], [row.index])[0],
    )


def seed_states(seeds: list[int], choices: list[int]) -> np.ndarray:
    """Mix each row's seed and the number of its choice: uint64 [rows], for `uniforms`."""
    parts = np.array([[part & _MASK64 for part in numbers] for numbers in (seeds, choices)], np.uint64)
    return _mix(_mix(np.zeros(len(seeds), np.uint64), parts[0]), parts[1])


def uniforms(states: np.ndarray, positions: list[int]) -> np.ndarray:
    """Pseudorandom numbers in [0, 1), one for each row: SplitMix64 over seed, choice and position.

    float64 [rows], with 24 significant bits, so that float32 holds them exactly.
    """
    return (_mix(states, np.array(positions, np.uint64)) >> np.uint64(40)) / (1 << 24)


def _mix(state: np.ndarray, parts: np.ndarray) -> np.ndarray:
    state = state + parts + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
