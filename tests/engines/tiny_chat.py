"""Tiny random chat models of several families, and helpers that run an engine and collect its events."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from catalogue import ChatModelEntry
from protocol.events import Delta, Event, Failed, Finished, is_terminal
from protocol.jobs import ChatJob, SamplingParams, TextJob
from workers.engines.chat import ChatEngine

TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'bad' -%}{{- raise_exception('Unknown role: bad') -}}{%- endif -%}"
    "<|{{- message['role'] }}|>{{- message['content'] -}}"
    "{%- if not loop.last or add_generation_prompt %}<|end|>{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}<|assistant|>{{- prefix or '' -}}{%- endif -%}"
)
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
VOCABULARY = 512

_shape = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
_shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
CONFIGS = {
    "llama": lambda: LlamaConfig(**_shape, initializer_range=0.2),
    "qwen2": lambda: Qwen2Config(**_shape, tie_word_embeddings=True, initializer_range=0.2),
    "qwen3": lambda: Qwen3Config(**_shape, head_dim=32, initializer_range=0.2),
    "mistral": lambda: MistralConfig(**_shape, sliding_window=24, initializer_range=0.2),
    "gemma2": lambda: Gemma2Config(
        **_shape, head_dim=16, sliding_window=24, initializer_range=0.2, query_pre_attn_scalar=16
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **_shape, head_dim=16, sliding_window=24, initializer_range=0.2, sliding_window_pattern=2
    ),
    "olmo2": lambda: Olmo2Config(**_shape, eos_token_id=0, initializer_range=0.2),
    "phi3": lambda: Phi3Config(**_shape, pad_token_id=0, eos_token_id=0, initializer_range=0.2),
    "mixtral": lambda: MixtralConfig(**_shape, num_local_experts=4, initializer_range=0.2),
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE: every text has tokens, which may split characters of several bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog, and then again"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|end|>",
        additional_special_tokens=SPECIAL[1:],
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def save_model(folder: Path, config: Any, *, dtype: torch.dtype = torch.float32, **generation: Any) -> Path:
    """Save a random model of `config` in transformers' format. The same config gives the same weights."""
    torch.manual_seed(20)
    tokenizer = make_tokenizer()
    config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    config.bos_token_id = None
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=0, **generation
    )
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def chat_job(id: str, content: str = "hello", continue_final: bool = False, **sampling: Any) -> ChatJob:
    """Make a job: greedy and 16 tokens, unless `sampling` has other values."""
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 16, **sampling})
    role = "assistant" if continue_final else "user"
    messages = [{"role": role, "content": content}]
    return ChatJob(
        id=id, model="tiny", messages=messages, sampling=params, continue_final_message=continue_final
    )


class Collector:
    """An `emit` that keeps all events and lets a test wait for them."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.events: dict[str, list[Event]] = {}
        self.calls = 0

    def __call__(self, events: Sequence[tuple[str, Event]]) -> None:
        with self._changed:
            self.calls += 1
            for request_id, event in events:
                self.events.setdefault(request_id, []).append(event)
            self._changed.notify_all()

    def wait(self, condition: Any, timeout_s: float = 60) -> None:
        with self._changed:
            if not self._changed.wait_for(condition, timeout_s):
                raise TimeoutError("the expected event didn't come")

    def wait_first(self, request_id: str) -> None:
        self.wait(lambda: self.events.get(request_id))

    def result(self, request_id: str) -> "Result":
        self.wait(lambda: any(is_terminal(event) for event in self.events.get(request_id, ())))
        return Result(self.events[request_id])


class Result:
    """All events of a finished request."""

    def __init__(self, events: list[Event]) -> None:
        self.events = events
        assert [is_terminal(event) for event in events] == [False] * (len(events) - 1) + [True]

    @property
    def failed(self) -> Failed:
        assert isinstance(self.events[-1], Failed), self.events[-1]
        return self.events[-1]

    @property
    def usage(self) -> Any:
        assert isinstance(self.events[-1], Finished), self.events[-1]
        return self.events[-1].usage

    def deltas(self, index: int = 0) -> list[Delta]:
        return [event for event in self.events if isinstance(event, Delta) and event.index == index]

    def text(self, index: int = 0) -> str:
        return "".join(delta.text for delta in self.deltas(index))

    def finish(self, index: int = 0) -> tuple[str | None, int | str | None]:
        *others, last = self.deltas(index)
        assert all(delta.finish_reason is None for delta in others)
        return last.finish_reason, last.stop_reason


def make_engine(weights: Path, **options: Any) -> tuple[ChatEngine, Collector]:
    """Load an engine. Returns it and the collector of its events. The caller closes it."""
    entry = ChatModelEntry.model_validate(
        {
            "name": "tiny",
            "tasks": ["chat"],
            "weights": str(weights),
            "engine": {"torch_threads": 1, **options},
        }
    )
    engine, collector = ChatEngine(entry), Collector()
    engine.load(collector)
    return engine, collector


@contextmanager
def together(engine: ChatEngine) -> Iterator[None]:
    """Let the engine admit everything that is submitted inside this block in one step."""
    go, admit = threading.Event(), engine._admit

    def admit_later() -> None:
        go.wait(60)
        admit()

    engine._admit = admit_later  # type: ignore[method-assign]
    try:
        yield
    finally:
        engine._admit = admit  # type: ignore[method-assign]
        go.set()


def run(engine: ChatEngine, collector: Collector, jobs: Sequence[TextJob]) -> list[Result]:
    """Submit all jobs, let the engine admit them in one step, and wait for all results."""
    with together(engine):
        for job in jobs:
            engine.submit(job)
    return [collector.result(job.id) for job in jobs]
