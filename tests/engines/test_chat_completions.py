"""The chat engine on completions of plain prompts: echo, log probabilities of the prompt, the tokenizer's
jobs.

The reference is the model in transformers: its log-softmax in float32.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from protocol.events import Delta, Echo, Finished, Text, TokenLogprob, Tokens, Usage
from protocol.jobs import ChatJob, CompletionJob, DetokenizeJob, OutputFormat, SamplingParams, TokenizeJob
from tests.engines.tiny_chat import (
    CONFIGS,
    VOCABULARY,
    Collector,
    Result,
    chat_job,
    make_engine,
    make_tokenizer,
    run,
    save_model,
)
from tests.engines.tiny_sentencepiece import save_sentencepiece_model, train
from workers.engines.chat import ChatEngine
from workers.engines.chat.detokenizer import Vocabulary
from workers.engines.chat.sampling import scoring

TOKENS = len(make_tokenizer())
FAMILIES = ("llama", "gemma2", "phi3", "mixtral")
Engines = dict[str, tuple[ChatEngine, Collector, Any]]
TEXT = "the quick brown fox jumps over the lazy dog, and then again"


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    """Engines that score few tokens in a step, so that every prompt takes several."""
    patch = pytest.MonkeyPatch()
    patch.setattr(scoring, "MOST_BYTES", 20 * 4 * VOCABULARY)
    made: Engines = {}
    for family in FAMILIES:
        folder = save_model(tmp_path_factory.mktemp(family), CONFIGS[family]())
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        made[family] = (*make_engine(folder, dtype="float32", kv_cache_tokens=1056, max_batch_size=8), model)
    patch.undo()
    yield made
    for engine, _, _ in made.values():
        engine.close()


def completion(id: str, prompt: str | list[int], *, echo: bool = True, **fields: Any) -> CompletionJob:
    own = {name: fields.pop(name) for name in ("output_format", "checked") if name in fields}
    sampling = SamplingParams(**{"temperature": 0.0, "max_tokens": 1, "logprobs": 2, **fields})
    return CompletionJob(id=id, model="tiny", prompt=prompt, sampling=sampling, echo=echo, **own)


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(4, TOKENS, (length,), generator=generator).tolist() for length in lengths]


def echoed(result: Result) -> list[TokenLogprob]:
    return [each for event in result.events if isinstance(event, Echo) for each in event.logprobs or ()]


@torch.inference_mode()
def expected(model: Any, tokens: list[int]) -> torch.Tensor:
    """Log probabilities [tokens, vocabulary] after each token."""
    return model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)


def check_scores(model: Any, prompt: list[int], found: list[TokenLogprob]) -> None:
    reference = expected(model, prompt)
    first, *others = found
    assert len(found) == len(prompt) and first.logprob is None and first.top == []
    for at, token in enumerate(others):
        best = reference[at, :TOKENS].topk(2).values.tolist()
        assert token.logprob == pytest.approx(float(reference[at, prompt[at + 1]]), abs=1e-4)
        assert [each.logprob for each in token.top] == pytest.approx(best, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_scored_as_by_transformers(engines: Engines, family: str) -> None:
    """In one batch with chats, in several steps, after the same prompts have filled the prefix cache."""
    engine, collector, model = engines[family]
    own = prompts(90, 1, 2, 20, 21, 41)
    run(engine, collector, [completion(f"warm {at}", each, echo=False) for at, each in enumerate(own)])
    jobs = [completion(f"score {at}", each) for at, each in enumerate(own)]
    chats = [chat_job(f"chat {at}", f"hello {at}", max_tokens=30) for at in range(2)]
    alone = [
        run(engine, collector, [chat_job(f"alone {at}", f"hello {at}", max_tokens=30)])[0] for at in (0, 1)
    ]
    results = run(engine, collector, [*chats, *jobs])
    for prompt, result in zip(own, results[2:], strict=True):
        check_scores(model, prompt, echoed(result))
        assert result.usage == Usage(len(prompt), 1, 0)
    assert [result.text() for result in results[:2]] == [result.text() for result in alone]


def test_a_scored_prompt_is_not_computed_in_one_step(engines: Engines) -> None:
    engine, collector, _ = engines["llama"]
    before = engine.metrics.steps
    (result,) = run(engine, collector, [completion("steps", *prompts(90))])
    pieces = [event.logprobs for event in result.events if isinstance(event, Echo) and event.logprobs]
    assert max(map(len, pieces)) <= 20
    assert engine.metrics.steps - before >= 5


def test_the_generated_token_follows_with_its_log_probability(engines: Engines) -> None:
    engine, collector, model = engines["llama"]
    (prompt,) = prompts(30)
    (result,) = run(engine, collector, [completion("one", prompt, max_tokens=3)])
    own = [each for delta in result.deltas() for each in delta.logprobs or ()]
    assert len(own) == 3
    assert own[0].logprob == pytest.approx(
        float(expected(model, prompt)[-1, :TOKENS].log_softmax(-1).max()), abs=1e-4
    )


def test_without_tokens_to_generate_only_the_prompt_comes_back(engines: Engines) -> None:
    engine, collector, model = engines["llama"]
    own = prompts(45, 1)
    jobs = [completion(f"zero {at}", each, max_tokens=0, n=2) for at, each in enumerate(own)]
    jobs += [completion("zero plain", TEXT, max_tokens=0, logprobs=None)]
    jobs += [completion("zero bare", TEXT, max_tokens=0, logprobs=None, echo=False)]
    results = run(engine, collector, jobs)
    for prompt, result in zip(own, results, strict=False):
        check_scores(model, prompt, echoed(result))
    for result in results:
        assert result.usage.completion_tokens == 0
        assert {(delta.text, delta.finish_reason) for delta in result.deltas()} == {("", "length")}
    assert [len([e for e in each.events if isinstance(e, Delta)]) for each in results] == [2, 2, 1, 1]
    assert [event for event in results[2].events if isinstance(event, Echo)] == [Echo(TEXT)]
    assert not any(isinstance(event, Echo) for event in results[3].events)


def test_a_preempted_prompt_is_scored_once(engines: Engines) -> None:
    """The cache has room for some of the sequences only, so that several begin again."""
    engine, collector, model = engines["llama"]
    own = prompts(*[150] * 8)
    before = engine.parts.scheduler.preemptions
    jobs = [completion(f"crowd {at}", each, max_tokens=100, min_tokens=100) for at, each in enumerate(own)]
    results = run(engine, collector, jobs)
    assert engine.parts.scheduler.preemptions > before
    for prompt, result in zip(own, results, strict=True):
        check_scores(model, prompt, echoed(result))
        assert result.usage.completion_tokens == 100


def test_choices_share_one_scored_prompt(engines: Engines) -> None:
    engine, collector, model = engines["llama"]
    (prompt,) = prompts(50)
    # without a seed it could end at once
    job = completion("three", prompt, n=3, temperature=1.0, max_tokens=4, min_tokens=4)
    (result,) = run(engine, collector, [job])
    check_scores(model, prompt, echoed(result))
    assert len({result.text(index) for index in range(3)}) > 1
    assert result.usage == Usage(50, 12, 0)


def test_a_failed_step_is_repeated_without_scores_that_come_twice(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, collector, model = engines["llama"]
    own = prompts(50, 33)
    sample = engine.parts.sampler.sample
    failed: list[bool] = []

    def fail_once(*arguments: Any) -> Any:
        if not failed:
            failed.append(True)
            raise RuntimeError("the sampler fails")
        return sample(*arguments)

    monkeypatch.setattr(engine.parts.sampler, "sample", fail_once)
    jobs = [completion(f"again {at}", each) for at, each in enumerate(own)]
    for prompt, result in zip(own, run(engine, collector, jobs), strict=True):
        check_scores(model, prompt, echoed(result))
    assert failed


def test_a_text_is_encoded_with_its_control_tokens(engines: Engines) -> None:
    engine, collector, _ = engines["llama"]
    text = "<|user|>hello<|end|><|assistant|>"
    by_chat, by_text = run(
        engine,
        collector,
        [chat_job("by chat", logprobs=0), completion("by text", text, echo=False, max_tokens=16, logprobs=0)],
    )
    assert by_text.usage.prompt_tokens == by_chat.usage.prompt_tokens
    assert by_text.text() == by_chat.text()


def test_the_token_that_ends_a_text_has_a_log_probability(engines: Engines) -> None:
    """Clients that score take the last one away, whatever it is."""
    engine, collector, _ = engines["llama"]
    (prompt,) = prompts(30)
    (free,) = run(engine, collector, [completion("free", prompt, echo=False)])
    (token,) = [each for delta in free.deltas() for each in delta.logprobs or ()]
    ends = [
        number
        for number in range(TOKENS)
        if engine.parts.prompts.vocabulary.describe(number)[0] == token.token
    ]
    (result,) = run(engine, collector, [completion("ended", prompt, stop_token_ids=tuple(ends))])
    assert result.finish()[0] == "stop" and result.text() == ""
    assert [each.token for delta in result.deltas() for each in delta.logprobs or ()] == [token.token]
    (chat,) = run(engine, collector, [chat_job("chat", logprobs=0, stop_token_ids=tuple(range(TOKENS)))])
    assert [delta.logprobs for delta in chat.deltas()] == [[]]


def test_a_completion_can_have_a_format(engines: Engines) -> None:
    engine, collector, _ = engines["llama"]
    wanted = OutputFormat(kind="choice", text='["yes", "no"]', param="guided_choice")
    (result,) = run(engine, collector, [completion("format", TEXT, max_tokens=9, output_format=wanted)])
    assert result.text() in ("yes", "no")


@pytest.mark.parametrize(
    ("prompt", "fields", "code", "message"),
    [
        ([5, VOCABULARY], {}, "invalid_request", "contains token 512"),
        ("", {}, "invalid_request", "empty"),
        ([], {}, "invalid_request", "empty"),
        ([5] * 1024, {}, "context_length_exceeded", "your prompt resulted in 1024 tokens"),
        ("fox " * 100_000, {}, "context_length_exceeded", "at least"),
    ],
)
def test_a_prompt_that_does_not_fit_is_refused(
    engines: Engines, prompt: Any, fields: Any, code: str, message: str
) -> None:
    engine, collector, _ = engines["llama"]
    (result,) = run(engine, collector, [completion(f"bad {type(prompt)}{len(prompt)}", prompt, **fields)])
    assert result.failed.code == code and result.failed.param == "prompt"
    assert message in result.failed.message
    beside = completion(f"beside {type(prompt)}{len(prompt)}", TEXT, checked=[TEXT, prompt])
    assert run(engine, collector, [beside])[0].failed == result.failed


def test_prompts_that_are_only_checked_change_nothing(engines: Engines) -> None:
    engine, collector, _ = engines["llama"]
    alone, beside = run(
        engine, collector, [completion("alone", TEXT), completion("beside", TEXT, checked=[[5, 6], TEXT])]
    )
    assert beside.text() == alone.text() and beside.usage == alone.usage


def test_a_prompt_may_fill_the_context_if_nothing_is_generated(engines: Engines) -> None:
    engine, collector, model = engines["llama"]
    (prompt,) = prompts(1024)
    (result,) = run(engine, collector, [completion("full", prompt, max_tokens=0)])
    check_scores(model, prompt, echoed(result))


def test_a_scored_prompt_may_fill_the_cache(tmp_path: Path) -> None:
    """Of a model whose context is longer than the cache; it must not block the requests behind it."""
    folder = save_model(tmp_path, CONFIGS["llama"]())
    engine, collector = make_engine(folder, dtype="float32", kv_cache_tokens=240)
    try:
        assert engine.parts.max_context == engine.parts.kv_cache_tokens == 240
        (prompt,) = prompts(240)
        full, behind = run(engine, collector, [completion("full", prompt, max_tokens=0), chat_job("behind")])
        assert len(echoed(full)) == 240 and behind.usage.completion_tokens
    finally:
        engine.close()


def test_a_scored_request_can_be_cancelled(engines: Engines) -> None:
    engine, collector, model = engines["llama"]
    jobs = [completion(f"cancel {at}", each, max_tokens=0) for at, each in enumerate(prompts(*[800] * 8))]
    for job in jobs:
        engine.submit(job)
    for job in jobs:
        engine.cancel(job.id, "deadline")
    for job in jobs:
        result = collector.result(job.id)
        assert isinstance(result.events[-1], Finished) or result.failed.code == "deadline_exceeded"
    (prompt,) = prompts(40)
    (after,) = run(engine, collector, [completion("after", prompt)])
    check_scores(model, prompt, echoed(after))


def test_a_continued_text_keeps_the_space_of_its_first_word(tmp_path: Path) -> None:
    """A SentencePiece tokenizer drops the space of a first word."""
    tokenizer = AutoTokenizer.from_pretrained(save_sentencepiece_model(tmp_path, train("bpe")))
    vocabulary = Vocabulary.of(tokenizer)
    whole = tokenizer("the quick brown fox", add_special_tokens=False)["input_ids"]
    for cut in range(1, len(whole)):
        detokenizer = vocabulary.continuing(whole[:cut], ())
        text = "".join(detokenizer.add(token)[0] for token in whole[cut:]) + detokenizer.flush()[0]
        assert vocabulary.decode(whole[:cut]) + text == vocabulary.decode(whole)


def answer_of(engine: ChatEngine, collector: Collector, job: TokenizeJob | DetokenizeJob) -> Any:
    engine.submit(job)
    event, end = collector.result(job.id).events
    assert end == Finished()
    return event


def test_texts_and_chats_are_tokenized(engines: Engines) -> None:
    engine, collector, _ = engines["llama"]
    tokenizer = make_tokenizer()
    text = "<|user|>hello, wörld"
    ids = tokenizer(text)["input_ids"]
    found = answer_of(engine, collector, TokenizeJob(id="t1", model="tiny", text=text, with_strings=True))
    assert found == Tokens(ids, tokenizer.convert_ids_to_tokens(ids), 1024)
    chat = ChatJob(
        id="", model="tiny", messages=[{"role": "user", "content": "hi<|end|>"}], sampling=SamplingParams()
    )
    for prompted in (True, False):
        job = TokenizeJob(id=f"t2{prompted}", model="tiny", chat=chat, add_generation_prompt=prompted)
        tokens = answer_of(engine, collector, job).ids
        assert (tokens[-1] == tokenizer.convert_tokens_to_ids("<|assistant|>")) is prompted
        assert tokens.count(tokenizer.convert_tokens_to_ids("<|end|>")) == int(prompted)
    assert answer_of(engine, collector, TokenizeJob(id="t3", model="tiny")) == Tokens([], None, 1024)


def test_tokens_become_text(engines: Engines) -> None:
    engine, collector, _ = engines["llama"]
    text = "<|user|>hello, wörld"
    ids = make_tokenizer()(text)["input_ids"]
    assert answer_of(engine, collector, DetokenizeJob(id="d1", model="tiny", tokens=ids)) == Text(text)
    assert answer_of(engine, collector, DetokenizeJob(id="d2", model="tiny", tokens=[])) == Text("")
    engine.submit(DetokenizeJob(id="d3", model="tiny", tokens=[5, 511]))
    assert collector.result("d3").failed.param == "tokens"
