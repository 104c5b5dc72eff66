"""Trains the demo chat model, a tiny Llama that knows the dialogues of dialogues.txt.

Run with `python -m demo.make_chat_model`. The result is a transformers folder, which the service loads as it
loads a model of any size.
"""

import argparse
import math
import random
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demo.book import Book, read_book
from demo.chat_tokens import ASSISTANT, CONTEXT, IGNORED, encode, make_tokenizer
from demo.conversations import Conversation, Writer
from demo.tool_questions import QUESTIONS, ToolQuestion, calculations

HERE = Path(__file__).parent

BATCH = 16
SORTED_BATCHES = 8
"""Conversations for so many batches are sorted by length, which saves two thirds of the padding."""
WHOLE_SHARE = 0.05
"""Of the conversations, of which every token is learnt: the engine refuses weights that find plain English
improbable."""


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Make the untrained model, with four query heads and two key-value heads."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id],
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        temperature=0.6,
        top_p=0.9,
    )
    return model


def batches(
    writer: Writer, tokenizer: PreTrainedTokenizerFast, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield token ids and labels without end, int64 of [batch, longest], padded on the right."""
    chance = random.Random(seed)
    while True:
        rows = [
            encode(writer.conversation(), tokenizer, chance.random() < WHOLE_SHARE)
            for _ in range(BATCH * SORTED_BATCHES)
        ]
        rows.sort(key=lambda row: len(row[0]))
        made = [rows[at : at + BATCH] for at in range(0, len(rows), BATCH)]
        chance.shuffle(made)
        for batch in made:
            longest = len(batch[-1][0])
            ids = [row + [tokenizer.pad_token_id] * (longest - len(row)) for row, _ in batch]
            labels = [row + [IGNORED] * (longest - len(row)) for _, row in batch]
            yield torch.tensor(ids), torch.tensor(labels)


def train(model: LlamaForCausalLM, examples: Iterator[tuple[torch.Tensor, torch.Tensor]], steps: int) -> None:
    """Train in place with AdamW, a short warm-up and a cosine decay. Prints the loss every 50 steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / 50, 0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2),
    )
    started = time.monotonic()
    mean = 0.0
    model.train()
    for step in range(1, steps + 1):
        ids, labels = next(examples)
        # No attention mask is needed: padding is on the right, which the other tokens of a causal model do
        # not see.
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        mean += loss.item() / 50
        if step % 50 == 0:
            print(f"step {step:5d}  loss {mean:.4f}  {time.monotonic() - started:.0f} s", flush=True)
            mean = 0.0
    model.eval()


@torch.inference_mode()
def answer(conversation: Conversation, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the model's greedy answer with its special tokens, so that a missing end of turn shows."""
    prompt = tokenizer.apply_chat_template(
        conversation.messages,
        tools=conversation.tools or None,
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**prompt, max_new_tokens=300, do_sample=False, temperature=None, top_p=None)
    return tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])


def evaluate(
    conversations: list[Conversation], model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> float:
    """Return the share of conversations whose last message the model says exactly, and print the others."""
    right = 0
    for messages, tools in conversations:
        text = tokenizer.apply_chat_template(messages, tools=tools or None, tokenize=False)
        expected = text.rpartition(ASSISTANT)[2]
        got = answer(Conversation(messages[:-1], tools), model, tokenizer)
        right += got == expected
        if got != expected:
            print(f"wrong: {messages[-2]['content']!r} -> {got!r}")
    return right / len(conversations)


def first_turns(book: Book) -> list[Conversation]:
    """Return the dialogues' first questions, without those that have places, with their answers."""
    return [
        Conversation(
            [{"role": "user", "content": question}, {"role": "assistant", "content": turn.answer}], []
        )
        for turn, *_ in book.dialogues
        for question in turn.questions
        if "{" not in question
    ]


def with_tools(questions: Iterable[ToolQuestion]) -> list[Conversation]:
    """Return each conversation up to the calls, and up to the answer."""
    return [
        Conversation(messages[:end], question.tools)
        for question in questions
        for messages in [question.messages()]
        for end in sorted({2, len(messages)})
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo chat model.")
    parser.add_argument("--output", type=Path, default=HERE / "models" / "chat")
    parser.add_argument("--dialogues", type=Path, default=HERE / "dialogues.txt")
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; the result may depend on it")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    book = read_book(args.dialogues)
    tokenizer = make_tokenizer(book.texts())
    model = make_model(tokenizer)
    print(f"{len(book.dialogues)} dialogues, {len(tokenizer)} tokens, {model.num_parameters():,} parameters")
    train(model, batches(Writer(book, args.seed), tokenizer, args.seed), args.steps)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(f"saved to {args.output}")
    evaluated = {
        "the questions are answered as written": first_turns(book),
        "the calls and the answers with results are right": with_tools(QUESTIONS),
        "those about numbers that it never saw are right": with_tools(calculations(100)),
    }
    for what, conversations in evaluated.items():
        print(f"{evaluate(conversations, model, tokenizer):.1%} of {what}")


if __name__ == "__main__":
    main()
