"""Tiny random embedding models of several families, in the format of sentence-transformers."""

import json
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModel,
    BertConfig,
    ModernBertConfig,
    MPNetConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    XLMRobertaConfig,
)

from catalogue import EMBEDDING, EmbeddingModelEntry
from protocol.events import Finished, Vectors
from protocol.jobs import EmbeddingJob
from tests.engines.tiny_chat import Collector
from workers.engines.embedding import EmbeddingEngine

SIZE = 32
WORDS = [
    "a",
    "b",
    "c",
    "d",
    "e",
    "f",
    "g",
    "h",
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dog",
    "cat",
    "mat",
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
TEXTS = ["the quick brown fox", "a", "dog", " ".join(WORDS), "a b c d e f", "jumps over the lazy dog cat"]

_shape: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": SIZE,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 66,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "bert": lambda: BertConfig(**_shape),
    "xlm-roberta": lambda: XLMRobertaConfig(**{**_shape, "pad_token_id": 1}),
    "mpnet": lambda: MPNetConfig(**{**_shape, "pad_token_id": 1}),
    "modernbert": lambda: ModernBertConfig(
        **_shape, cls_token_id=2, sep_token_id=3, bos_token_id=2, eos_token_id=3, local_attention=8
    ),
    "qwen3": lambda: Qwen3Config(**_shape, head_dim=16, num_key_value_heads=1),
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word of WORDS, in any case; [CLS] and [SEP] around a text."""
    tokenizer = Tokenizer(
        models.WordLevel({token: at for at, token in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def save_model(folder: Path, family: str = "bert", **settings: Any) -> Path:
    """Save a random model without files of sentence-transformers. `settings`: further ones of its config."""
    torch.manual_seed(20)
    config = CONFIGS[family]()
    config.update(settings)
    AutoModel.from_config(config, dtype=torch.float32).eval().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def add_modules(folder: Path, *kinds: str, **pooling: Any) -> Path:
    """Write modules.json for a transformer and these modules, and the pooling's configuration."""
    paths = {"Transformer": "", "Pooling": "1_Pooling"}
    modules = [
        {
            "idx": at,
            "name": str(at),
            "path": paths.get(kind, f"{at}_{kind}"),
            "type": f"sentence_transformers.models.{kind}",
        }
        for at, kind in enumerate(("Transformer", *kinds))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling/config.json").write_text(json.dumps({"word_embedding_dimension": SIZE, **pooling}))
    return folder


def entry_of(weights: Path, **engine: Any) -> EmbeddingModelEntry:
    """The catalogue entry of a model."""
    return EmbeddingModelEntry.model_validate(
        {"name": "tiny", "tasks": (EMBEDDING.name,), "weights": str(weights), "engine": engine}
    )


def load(weights: Path, **engine: Any) -> tuple[EmbeddingEngine, Collector]:
    """Return a loaded engine on one thread."""
    found, collector = EmbeddingEngine(entry_of(weights, torch_threads=1, **engine)), Collector()
    found.load(collector)
    return found, collector


def job(id: str, *inputs: str | list[int], **fields: Any) -> EmbeddingJob:
    return EmbeddingJob(id=id, model="tiny", inputs=list(inputs), **fields)


def vectors_of(collector: Collector, id: str) -> list[torch.Tensor]:
    """Wait for the end of a job that succeeds, and return its vectors in the order of its inputs."""
    *events, last = collector.result(id).events
    assert isinstance(last, Finished), last
    rows: dict[int, torch.Tensor] = {}
    for event in events:
        assert isinstance(event, Vectors)
        size = len(event.data) // len(event.indices)
        for place, index in enumerate(event.indices):
            assert index not in rows
            rows[index] = torch.tensor(array("f", event.data[place * size : (place + 1) * size]).tolist())
    assert sorted(rows) == list(range(len(rows)))
    return [rows[index] for index in sorted(rows)]


def plain(weights: Path, text: str, pooling: str, *, normalize: bool) -> torch.Tensor:
    """The vector of one text by transformers alone."""
    tokens = make_tokenizer()(text, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        hidden = AutoModel.from_pretrained(weights).eval()(input_ids=tokens).last_hidden_state[0]
    vector: torch.Tensor = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling]
    return vector / vector.norm() if normalize else vector
