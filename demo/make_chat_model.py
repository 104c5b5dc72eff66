"""Trains the demo chat model, a tiny Llama that knows the dialogues of dialogues.txt.

Run with `python -m demo.make_chat_model`. The result is a transformers folder, which the service loads as it
loads a model of any size.
"""

import argparse
import math
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
SPECIAL_TOKENS = [PAD, BEGIN, END, "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
VOCABULARY = 832
CONTEXT = 4096
BATCH = 16
IGNORED = -100
"""The label that transformers' loss skips."""

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- set role = 'system' if message['role'] == 'developer' else message['role'] -%}
    {%- if role not in ['system', 'user', 'assistant', 'tool'] -%}
        {{- raise_exception('Unknown role: ' ~ role) -}}
    {%- endif -%}
    {{- '<|' ~ role ~ '|>' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- else -%}
        {%- for part in message['content'] or [] if part['type'] == 'text' -%}
            {{- part['text'] -}}
        {%- endfor -%}
    {%- endif -%}
    {{- eos_token -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>' -}}
{%- endif -%}
"""

Message = dict[str, str]


@dataclass(frozen=True)
class Turn:
    """One exchange: questions that mean the same, and the answer to each of them."""

    questions: tuple[str, ...]
    answer: str


Dialogue = list[Turn]


@dataclass
class Book:
    """The content of the dialogues file."""

    dialogues: list[Dialogue] = field(default_factory=list)
    systems: list[str] = field(default_factory=list)
    words: dict[str, list[str]] = field(default_factory=dict)

    def texts(self) -> Iterator[str]:
        """Yield every text of the file, with placeholders as they are."""
        for dialogue in self.dialogues:
            for turn in dialogue:
                yield from turn.questions
                yield turn.answer
        yield from self.systems
        for words in self.words.values():
            # With the space before them and repeated, so that each becomes one token: the model has to learn
            # to repeat a name, not to spell it.
            yield from [f" {word}" for word in words] * 5


def read_book(path: Path) -> Book:
    """Parse the dialogues file; its first lines explain the format. Raises ValueError for any other line."""
    book = Book()
    text = re.sub(r"^#.*\n", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for block in re.split(r"\n{2,}", text.strip()):
        # An indented line continues the line before it.
        lines = re.split(r"\n(?!  )", block)
        lines = [line.replace("\n  ", "\n") for line in lines]
        if lines[0].startswith("U: "):
            book.dialogues.append(_read_dialogue(lines))
            continue
        for line in lines:
            if line.startswith("S: "):
                book.systems.append(line[3:])
            elif match := re.fullmatch(r"\[(\w+)\] (.+)", line):
                book.words[match[1]] = match[2].split(" | ")
            else:
                raise ValueError(f"{path.name}: not a line of the format: {line!r}")
    return book


def _read_dialogue(lines: list[str]) -> Dialogue:
    dialogue: Dialogue = []
    questions: list[str] = []
    for line in lines:
        mark, text = line[:3], line[3:]
        if mark == "U: ":
            questions.append(text)
        elif mark == "A: " and questions:
            dialogue.append(Turn(tuple(questions), text))
            questions = []
        else:
            raise ValueError(f"not a line of a dialogue: {line!r}")
    if questions:
        raise ValueError(f"no answer to {questions[0]!r}")
    return dialogue


class Writer:
    """Composes conversations from the book, with varying order, wording and system message."""

    def __init__(self, book: Book, seed: int) -> None:
        self._book = book
        self._random = random.Random(seed)
        self._vocabulary = sorted({word for text in book.texts() for word in re.findall(r"\w+", text)})
        self._weights = [self._weight(dialogue) for dialogue in book.dialogues]

    def conversation(self) -> list[Message]:
        """Return a conversation of one to four dialogues, in half of the cases with a system message."""
        messages: list[Message] = []
        asked: set[str] = set()
        if self._random.random() < 0.5:
            messages.append({"role": "system", "content": self._system()})
        for _ in range(self._random.choice((1, 1, 2, 2, 3, 4))):
            messages += self._dialogue(asked)
        return messages

    def _weight(self, dialogue: Dialogue) -> float:
        """Return the sampling weight of a dialogue, which grows with its number of wordings."""
        wordings = 0
        for question in dialogue[0].questions:
            places = re.findall(r"\{(\w+)\}", question)
            wordings += max((len(self._book.words.get(place, "")) for place in places), default=1) or 1
        return min(math.sqrt(wordings), 14)

    def _system(self) -> str:
        count = self._random.choice((1, 1, 1, 2, 3))
        return " ".join(self._fill(text, {}) for text in self._random.sample(self._book.systems, count))

    def _dialogue(self, asked: set[str]) -> list[Message]:
        """Return one dialogue and add its questions to `asked`; nothing if one of them was asked already.

        The answer to "What is my name?" depends on what was said before, so a conversation may have only one
        of the dialogues with this question.
        """
        dialogue = self._random.choices(self._book.dialogues, self._weights)[0]
        questions = {question for turn in dialogue for question in turn.questions}
        if questions & asked:
            return []
        asked |= questions
        messages: list[Message] = []
        # One name for the whole dialogue, because a later turn asks for the name given in an earlier one.
        filled = {"name": self._random.choice(self._book.words["name"])}
        for number, turn in enumerate(dialogue):
            if number and self._random.random() < 0.3:
                messages += self._dialogue(asked)
            question = self._fill(self._reword(self._random.choice(turn.questions)), filled)
            messages.append({"role": "user", "content": question})
            if self._random.random() < 0.03:
                messages.append({"role": "tool", "content": self._fill("{number}", {})})
            messages.append({"role": "assistant", "content": self._fill(turn.answer, filled)})
        return messages

    def _fill(self, text: str, filled: Message) -> str:
        """Replace each `{word}` by its entry in `filled`, or else by one of the book's words."""

        def word(match: re.Match[str]) -> str:
            key = match[1].lower()
            if key == "noise":
                return self._noise()
            return filled.get(key) or self._random.choice(self._book.words[key])

        return re.sub(r"\{(\w+)\}", word, text)

    def _noise(self) -> str:
        """Return text without meaning: letters, digits, one word repeated, or random words of the book."""
        chance = self._random
        kind = chance.random()
        if kind < 0.3:
            letters = "abcdefghijklmnopqrstuvwxyz" if kind < 0.2 else "0123456789-+.?"
            words = ["".join(chance.choices(letters, k=chance.randint(1, 8))) for _ in range(3)]
            return " ".join(words[: chance.randint(1, 3)])
        if kind < 0.4:
            return chance.choice("🚀🌍🐱🎉你是我中文éüß!?.,xyz") * chance.choice((1, 2, 3, 100))
        count = int(chance.paretovariate(0.7)) + 1
        if kind < 0.6:
            return " ".join([chance.choice(self._vocabulary)] * min(count, 80))
        return " ".join(chance.choices(self._vocabulary, k=min(count, 80)))

    def _reword(self, question: str) -> str:
        """Vary the question as users type it: other case, other punctuation, a missing letter."""
        kind = self._random.random()
        if kind < 0.10:
            return question.lower()
        if kind < 0.20:
            return question.rstrip(".?!")
        if kind < 0.25:
            return question.rstrip(".?!") + self._random.choice((".", "!", "?", "??", " ", "\n"))
        if kind < 0.30:
            return question.upper()
        if kind < 0.34 and len(question) > 12 and "{" not in question:
            place = self._random.randrange(len(question))
            return question[:place] + question[place + 1 :]
        return question


def make_tokenizer(book: Book) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer. All 256 bytes are in its vocabulary, so it can encode any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(book.texts(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=SPECIAL_TOKENS[3:],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Make the untrained model, with four query heads and two key-value heads."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=3,
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


def encode(messages: list[Message], tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Return token ids and labels of a conversation, equally long. Only the assistant's text has labels.

    Each message is rendered by the chat template, so that training and serving can't differ.
    """
    ids = [tokenizer.bos_token_id]
    labels = [IGNORED]
    for message in messages:
        text = tokenizer.apply_chat_template([message], tokenize=False).removeprefix(BEGIN)
        tokens = tokenizer.encode(text, add_special_tokens=False)
        ids += tokens
        # The first token names the role, which the model never has to predict.
        labels += [IGNORED, *tokens[1:]] if message["role"] == "assistant" else [IGNORED] * len(tokens)
    return ids, labels


def make_batch(
    conversations: list[list[Message]], tokenizer: PreTrainedTokenizerFast
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and labels, int64 of [batch, longest], padded on the right."""
    rows = [encode(messages, tokenizer) for messages in conversations]
    longest = max(len(ids) for ids, _ in rows)
    ids = [row + [tokenizer.pad_token_id] * (longest - len(row)) for row, _ in rows]
    labels = [row + [IGNORED] * (longest - len(row)) for _, row in rows]
    return torch.tensor(ids), torch.tensor(labels)


def train(model: LlamaForCausalLM, writer: Writer, tokenizer: PreTrainedTokenizerFast, steps: int) -> None:
    """Train in place with AdamW, a short warm-up and a cosine decay. Prints the loss every 50 steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / 50, 0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2),
    )
    started = time.monotonic()
    model.train()
    for step in range(1, steps + 1):
        ids, labels = make_batch([writer.conversation() for _ in range(BATCH)], tokenizer)
        # No attention mask is needed: padding is on the right, which the other tokens of a causal model do
        # not see.
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps:
            print(f"step {step:5d}  loss {loss.item():.4f}  {time.monotonic() - started:.0f} s", flush=True)
    model.eval()


@torch.inference_mode()
def answer(
    messages: list[Message], model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, limit: int = 300
) -> str:
    """Return the model's greedy answer with its special tokens, so that a missing end of turn shows."""
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=limit, do_sample=False, temperature=None, top_p=None)
    return tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])


def evaluate(book: Book, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> float:
    """Return the share of first-turn questions that get exactly their answer, and print the others."""
    right = total = 0
    for dialogue in book.dialogues:
        for question in dialogue[0].questions:
            if "{" in question:
                continue
            got = answer([{"role": "user", "content": question}], model, tokenizer)
            total += 1
            right += got == dialogue[0].answer + END
            if got != dialogue[0].answer + END:
                print(f"wrong: {question!r} -> {got!r}")
    return right / total


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo chat model.")
    parser.add_argument("--output", type=Path, default=HERE / "models" / "chat")
    parser.add_argument("--dialogues", type=Path, default=HERE / "dialogues.txt")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; the result may depend on it")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    book = read_book(args.dialogues)
    tokenizer = make_tokenizer(book)
    model = make_model(tokenizer)
    print(f"{len(book.dialogues)} dialogues, {len(tokenizer)} tokens, {model.num_parameters():,} parameters")
    train(model, Writer(book, args.seed), tokenizer, args.steps)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(f"saved to {args.output}")
    print(f"{evaluate(book, model, tokenizer):.1%} of the questions are answered as written")


if __name__ == "__main__":
    main()
