"""The chat engine with a trained model of 30 layers: the same text as `generate`, and true answers."""

import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from protocol.events import Echo
from protocol.jobs import ChatJob, CompletionJob, SamplingParams
from tests.engines.tiny_chat import chat_job, make_engine, run
from workers.engines.chat.sampling.scoring import max_scored

pytestmark = pytest.mark.slow

NEAR_TIE = 1e-3
"""Difference of the two best logits, which have a standard deviation of about 4, that rounding may turn."""

QUESTIONS = [
    "What is the capital of France?",
    "What is the capital of Japan?",
    "What is the capital of Italy?",
    "What is the capital of Germany?",
    "What is the capital of England?",
    "What is 2 + 2?",
    "What color is the sky?",
    "How many days are in a week?",
    "Who wrote Romeo and Juliet?",
    "What is the largest planet in our solar system?",
    "What is the chemical formula of water?",
    "What language is spoken in Brazil?",
    "Which animal says meow?",
    "What do bees make?",
    "What is the opposite of hot?",
    "How many legs does a spider have?",
    "What is the fastest land animal?",
    "In which year did World War II end, and which countries had been at war for longer than five years?",
    "Name the first month of the year.",
    "Translate 'hello' into French.",
    "Say hello.",
    "Who painted the Mona Lisa?",
    "What is the boiling point of water in Celsius?",
    "Write a haiku about the sea.",
    "What is the currency of Japan?",
    "Write a Python function that adds two numbers.",
    "What comes after Monday?",
    "Which ocean is the largest?",
    "¿Cuál es la capital de España? 你好!",
    "Continue: 1, 2, 3,\n\n4, 5,",
]
FACTS = {
    "What is the capital of France?": "Paris",
    "What is the capital of Japan?": "Tokyo",
    "What is the capital of Germany?": "Berlin",
    "What is 2 + 2?": "4",
    "How many days are in a week?": "7",
    "Which animal says meow?": "cat",
}


def generated(folder: Path, jobs: list[ChatJob], tokens: int) -> list[tuple[str, float]]:
    """Text of `generate` in float32 for each job, and the smallest difference of its two best logits."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts = [
        tokenizer.apply_chat_template(job.messages, tokenize=False, add_generation_prompt=True)
        for job in jobs
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    out = model.generate(
        **batch,
        do_sample=False,
        max_new_tokens=tokens,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(out.logits, 1).topk(2).values
    margins = (best[..., 0] - best[..., 1]).amin(1).tolist()
    answers = tokenizer.batch_decode(
        out.sequences[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return list(zip(answers, margins, strict=True))


def test_thirty_greedy_answers_in_one_batch_are_those_of_generate(smollm2: Path) -> None:
    jobs = [chat_job(f"{number}", text, max_tokens=20) for number, text in enumerate(QUESTIONS)]
    engine, collector = make_engine(smollm2, dtype="float32", max_batch_size=30, kv_cache_tokens=4096)
    try:
        results = run(engine, collector, jobs)
        assert engine.metrics.max_batch == len(jobs) == 30
    finally:
        engine.close()
    ties = 0
    for job, result, (text, margin) in zip(jobs, results, generated(smollm2, jobs, 20), strict=True):
        if result.text() != text:
            assert margin < NEAR_TIE, f"{job.messages}: {result.text()!r} is not {text!r}"
            ties += 1
    assert ties <= 1
    assert {result.finish()[0] for result in results} == {"stop", "length"}
    ended = [result.finish()[1] for result in results if result.finish()[0] == "stop"]
    assert set(ended) == {2}, "<|im_end|> ends an answer"


def test_true_answers_in_bfloat16(smollm2: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        engine, collector = make_engine(smollm2, dtype="bfloat16", kv_cache_tokens=4096)
    try:
        assert engine.parts.attention.name == "compiled loops"
        results = run(engine, collector, [chat_job(question, question) for question in FACTS])
    finally:
        engine.close()
    assert not caplog.records, "a faster way was refused"
    for (question, fact), result in zip(FACTS.items(), results, strict=True):
        assert fact in result.text(), question


def test_a_long_prompt_is_scored_as_by_transformers(smollm2: Path) -> None:
    """Its logits are 104 MiB, and no step computes more than 48 MiB of them."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    ids = tokenizer("\n".join(QUESTIONS))["input_ids"] * 2
    assert len(ids) > 2 * max_scored(len(tokenizer))
    engine, collector = make_engine(smollm2, dtype="float32", kv_cache_tokens=2048)
    try:
        sampling = SamplingParams(max_tokens=0, logprobs=3)
        job = CompletionJob(id="one", model="tiny", prompt=ids, sampling=sampling, echo=True)
        (result,) = run(engine, collector, [job])
    finally:
        engine.close()
    found = [each for event in result.events if isinstance(event, Echo) for each in event.logprobs or ()]
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    with torch.inference_mode():
        reference = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    own = torch.tensor([token.logprob for token in found[1:]])
    best = torch.tensor([[each.logprob for each in token.top] for token in found[1:]])
    assert (own - reference.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]).abs().max() < 1e-4
    assert (best - reference.topk(3).values).abs().max() < 1e-4
