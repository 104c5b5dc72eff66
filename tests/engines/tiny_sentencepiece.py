"""A SentencePiece tokenizer, trained by the sentencepiece package, and a tiny model that has it."""

import io
import json
from pathlib import Path

from sentencepiece import SentencePieceTrainer

from tests.engines.tiny_chat import CONFIGS, SPECIAL, TEMPLATE, save_model

TEXT = Path(__file__).parents[2] / "demo" / "dialogues.txt"


def train(kind: str) -> bytes:
    """Train as Llama's was: byte fallback, no normalization, spaces are kept."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.read_text(encoding="utf-8").splitlines()),
        model_writer=model,
        vocab_size=500,
        hard_vocab_limit=False,
        model_type=kind,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=SPECIAL,
        minloglevel=2,
    )
    return model.getvalue()


def save_sentencepiece_model(folder: Path, tokenizer: bytes) -> Path:
    """Save a random model whose only tokenizer is a SentencePiece file."""
    save_model(folder, CONFIGS["llama"]())
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(tokenizer)
    config = {"tokenizer_class": "LlamaTokenizer", "eos_token": "<|end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
