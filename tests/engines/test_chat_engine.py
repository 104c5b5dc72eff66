"""The chat engine compared with model.generate, and everything that starts, controls and ends a request."""

import logging
import math
import re
import shutil
import threading
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GptOssConfig, LlamaConfig, MambaConfig, T5Config

from protocol.events import Failed
from protocol.jobs import ChatJob, SamplingParams
from tests.engines.tiny_chat import (
    CONFIGS,
    VOCABULARY,
    Collector,
    Result,
    chat_job,
    make_engine,
    run,
    save_model,
)
from workers.engines.base import EngineLoadError
from workers.engines.chat import ChatEngine
from workers.engines.chat.attention.cpu import CpuPagedAttention

NEAR_TIE = 1e-4
PROMPTS = [
    "hello",
    "the quick brown fox " * 4,
    "你好 👩‍👩‍👧‍👦",
    "and then again " * 12,
    "x",
    "jumps over " * 7,
]
LENGTHS = [40, 7, 25, 60, 33, 12]


class Reference:
    """model.generate with the same weights, and the margins of its choices."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.padding = list(range(len(self.tokenizer), VOCABULARY))
        """The rows of the embedding beyond the tokenizer's tokens."""

    def prompt(self, job: ChatJob) -> list[int]:
        text = self.tokenizer.apply_chat_template(
            job.messages,
            tokenize=False,
            add_generation_prompt=not job.continue_final_message,
            continue_final_message=job.continue_final_message,
        )
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def greedy(self, job: ChatJob) -> tuple[str, list[float]]:
        """Generate. Returns the text, and for each token the difference of the two best scores."""
        ids = torch.tensor([self.prompt(job)])
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=job.sampling.max_tokens,
            eos_token_id=None if job.sampling.ignore_eos else self.tokenizer.eos_token_id,
            suppress_tokens=self.padding,
            output_scores=True,
            return_dict_in_generate=True,
        )
        margins = [float(best[0, 0] - best[0, 1]) for best in (step.topk(2).values for step in out.scores)]
        text = self.tokenizer.decode(out.sequences[0, ids.shape[1] :], skip_special_tokens=True)
        return text, margins


@pytest.fixture(scope="module", params=CONFIGS)
def family(request, tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp(request.param), CONFIGS[request.param]())


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"), CONFIGS["llama"]())


@pytest.fixture(scope="module")
def loaded(weights):
    engine, collector = make_engine(weights)
    yield engine, collector
    engine.close()


def ask(loaded: tuple[ChatEngine, Collector], *jobs: ChatJob) -> list[Result]:
    return run(*loaded, list(jobs))


@pytest.mark.slow
def test_greedy_equals_generate_in_every_family_and_mix(family):
    """Alone, twelve at once, and seven with chunked prefill and a batch of four."""
    reference = Reference(family)
    mixes: list[tuple[dict[str, Any], int]] = [
        ({"prefix_cache": False}, 1),
        ({}, 12),
        ({"prefill_chunk": 16, "max_batch_size": 4}, 7),
    ]
    ties = 0
    for number, (options, count) in enumerate(mixes):
        engine, collector = make_engine(family, **options)
        jobs = [
            chat_job(
                f"{number}-{i}", PROMPTS[i % 6] + str(i), max_tokens=LENGTHS[i % 6], ignore_eos=i % 3 > 0
            )
            for i in range(count)
        ]
        results = run(engine, collector, jobs)
        engine.close()
        for job, result in zip(jobs, results, strict=True):
            expected, margins = reference.greedy(job)
            if result.text() != expected:
                assert min(margins) < NEAR_TIE, f"{job.id}: {result.text()!r} is not {expected!r}"
                ties += 1
        assert engine.metrics.max_batch >= min(count, 2)
    assert ties <= 1


def test_requests_share_steps_and_join_a_running_batch(weights):
    engine, collector = make_engine(weights, prefix_cache=False)
    try:
        engine.submit(chat_job("first", max_tokens=900, ignore_eos=True))
        collector.wait_first("first")
        others = [chat_job(f"r{i}", f"{i} hello", max_tokens=50, ignore_eos=True) for i in range(15)]
        for result in run(engine, collector, others):
            assert result.finish() == ("length", None)
        assert engine.status().running == 1
        assert collector.result("first").usage.completion_tokens == 900
        # 1,650 tokens in few more steps than the longest answer needs
        assert engine.metrics.steps < 1030
        assert engine.metrics.max_batch == 16
        assert collector.calls <= engine.metrics.steps + 1
    finally:
        engine.close()


def test_the_status_counts_tokens_and_their_gaps(weights):
    engine, collector = make_engine(weights)
    try:
        jobs = [chat_job(str(at), content="again " * 40, max_tokens=10, ignore_eos=True) for at in range(2)]
        results = [result for job in jobs for result in run(engine, collector, [job])]
        results += run(engine, collector, [chat_job("n", max_tokens=10, ignore_eos=True, n=3)])
        counts = engine.status().counts
        assert counts is not None
        usages = [result.usage for result in results]
        assert counts.prompt_tokens == counts.prefix_queries == sum(usage.prompt_tokens for usage in usages)
        assert counts.prefix_hits == sum(usage.cached_tokens for usage in usages) > 0
        assert counts.generation_tokens == sum(usage.completion_tokens for usage in usages) == 50
        answers = 2 + 3
        assert counts.token_gaps.buckets()[-1] == ("+Inf", 50 - answers), "the first tokens have no gap"
        assert counts.token_gaps.seconds > 0
    finally:
        engine.close()
    assert engine.status().counts is not None, "what was counted is still told"


def test_events_of_one_answer(loaded):
    (result,) = ask(loaded, chat_job("events", max_tokens=20, ignore_eos=True))
    deltas = result.deltas()
    assert sum(delta.tokens for delta in deltas) == result.usage.completion_tokens == 20
    assert len(deltas) > 5
    assert result.finish() == ("length", None)


def test_eos_ends_the_text_and_its_id_is_the_stop_reason(loaded):
    eos = loaded[0].parts.prompts._tokenizer.eos_token_id
    (result,) = ask(loaded, chat_job("eos", max_tokens=50, logit_bias={eos: 100.0}, min_tokens=5))
    assert result.finish() == ("stop", eos)
    assert result.usage.completion_tokens == 6


def test_ignore_eos_goes_on_and_stop_token_ids_stop(loaded):
    eos = loaded[0].parts.prompts._tokenizer.eos_token_id
    on, stopped = ask(
        loaded,
        chat_job("on", max_tokens=9, logit_bias={eos: 100.0}, ignore_eos=True),
        chat_job("stopped", max_tokens=9, logit_bias={77: 100.0}, stop_token_ids=(77,), ignore_eos=True),
    )
    assert (on.finish(), on.text()) == (("length", None), "")
    assert (stopped.finish(), stopped.text()) == (("stop", 77), "")


def test_stop_strings_end_the_text_before_them_across_tokens(loaded):
    (free,) = ask(loaded, chat_job("free", max_tokens=40, ignore_eos=True))
    text = free.text()
    stop = next(text[at : at + 5] for at in range(8, len(text)) if text.find(text[at : at + 5]) == at)
    (stopped,) = ask(loaded, chat_job("by string", max_tokens=40, ignore_eos=True, stop=(stop, "never")))
    assert stopped.finish() == ("stop", stop)
    assert stopped.text() == text[: text.index(stop)]
    assert stopped.usage.completion_tokens < 40


def test_a_text_that_ends_inside_a_stop_string_is_sent_whole(loaded):
    (free,) = ask(loaded, chat_job("whole", max_tokens=12, ignore_eos=True))
    (held,) = ask(loaded, chat_job("held", max_tokens=12, ignore_eos=True, stop=(free.text()[-3:] + "\x00",)))
    assert held.text() == free.text()
    assert held.finish() == ("length", None)


def test_n_choices_compute_the_prompt_once(weights):
    engine, collector = make_engine(weights, prefix_cache=False)
    try:
        job = chat_job("n", "again " * 20, temperature=1.0, seed=4, n=5, max_tokens=12, ignore_eos=True)
        (many,) = run(engine, collector, [job])
        assert engine.metrics.prefill_tokens == many.usage.prompt_tokens
        assert many.usage.completion_tokens == 60
        texts = [many.text(index) for index in range(5)]
        assert len(set(texts)) == 5
        (one,) = run(
            engine,
            collector,
            [chat_job("1", "again " * 20, temperature=1.0, seed=4, max_tokens=12, ignore_eos=True)],
        )
        assert one.text() == texts[0]
    finally:
        engine.close()


def test_more_choices_than_slots_are_answered_in_turn(weights):
    engine, collector = make_engine(weights, max_batch_size=2)
    try:
        job = chat_job("n", temperature=1.0, seed=4, n=5, max_tokens=6, ignore_eos=True)
        (result,) = run(engine, collector, [job])
        assert [result.finish(index) for index in range(5)] == [("length", None)] * 5
    finally:
        engine.close()


def test_logprobs_are_the_models_own(loaded, weights):
    (result,) = ask(loaded, chat_job("lp", "hello", max_tokens=6, ignore_eos=True, logprobs=3))
    entries = [entry for delta in result.deltas() for entry in delta.logprobs or []]
    assert len(entries) == 6
    assert b"".join(bytes(entry.bytes) for entry in entries).decode(errors="replace") == result.text()
    reference = Reference(weights)
    job = chat_job("lp", "hello")
    with torch.inference_mode():
        logits = reference.model(input_ids=torch.tensor([reference.prompt(job)])).logits[0, -1]
    best = logits[: -len(reference.padding)].log_softmax(-1).topk(3).values.tolist()
    assert entries[0].logprob == pytest.approx(best[0], abs=1e-4)
    assert [top.logprob for top in entries[0].top] == pytest.approx(best, abs=1e-4)


def test_rows_beyond_the_tokenizer_are_neither_chosen_nor_reported(weights, tmp_path):
    """Rows that pad an embedding may have any values."""
    shutil.copytree(weights, tmp_path, dirs_exist_ok=True)
    tensors, known = load_file(weights / "model.safetensors"), len(AutoTokenizer.from_pretrained(weights))
    tensors["lm_head.weight"][known:] *= 50
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    engine, collector = make_engine(tmp_path)
    try:
        options: dict[str, Any] = {"max_tokens": 20, "ignore_eos": True, "logprobs": 20}
        jobs = [
            chat_job("greedy", **options),
            chat_job("drawn", temperature=2.0, seed=1, **options),
            chat_job("biased", logit_bias={known: 100.0}, **options),
        ]
        for result in run(engine, collector, jobs):
            entries = [entry for delta in result.deltas() for entry in delta.logprobs or []]
            assert len(entries) == 20
            for entry in entries:
                # a row that is no token would have no bytes
                assert all([entry.bytes, *(top.bytes for top in entry.top)])
                assert sum(math.exp(top.logprob) for top in entry.top) > 0.1
    finally:
        engine.close()


def test_logprobs_zero_reports_the_chosen_token_alone(loaded):
    (result,) = ask(loaded, chat_job("lp0", max_tokens=3, ignore_eos=True, logprobs=0))
    assert [entry.top for delta in result.deltas() for entry in delta.logprobs or []] == [[]] * 3


def test_continue_final_message_and_template_arguments(loaded):
    reference = Reference(Path(loaded[0].entry.weights))
    job = chat_job("continue", "The answer is", continue_final=True, max_tokens=10, ignore_eos=True)
    (result,) = ask(loaded, job)
    assert result.text() == reference.greedy(job)[0]
    assert result.usage.prompt_tokens == len(reference.prompt(job))
    plain = chat_job("plain")
    with_prefix = ChatJob(
        id="prefix",
        model="tiny",
        messages=plain.messages,
        sampling=plain.sampling,
        chat_template_kwargs={"prefix": "xyz"},
    )
    first, second = ask(loaded, plain, with_prefix)
    assert second.usage.prompt_tokens > first.usage.prompt_tokens


def test_max_tokens_is_capped_by_the_context(weights):
    engine, collector = make_engine(weights, max_context=64)
    try:
        (result,) = run(engine, collector, [chat_job("cap", max_tokens=5000, ignore_eos=True)])
        assert result.finish() == ("length", None)
        assert result.usage.prompt_tokens + result.usage.completion_tokens == 64
    finally:
        engine.close()


def test_a_prompt_longer_than_the_context_fails_with_both_numbers(loaded):
    (result,) = ask(loaded, chat_job("long", "fox " * 3000))
    assert (result.failed.code, result.failed.param) == ("context_length_exceeded", "messages")
    assert "1024" in result.failed.message
    assert any(int(word) > 1024 for word in result.failed.message.split() if word.isdigit())


def bad_jobs() -> list[Any]:
    messages, sampling = [{"role": "user", "content": "hello"}], SamplingParams(temperature=0.0)
    role = ChatJob(
        id="role", model="tiny", messages=[{"role": "bad", "content": "secret"}], sampling=sampling
    )
    clash = ChatJob(
        id="clash",
        model="tiny",
        messages=messages,
        sampling=sampling,
        chat_template_kwargs={"tokenize": True},
    )
    return [
        pytest.param(role, "messages", "Unknown role", id="template"),
        pytest.param(clash, "chat_template_kwargs", "tokenize", id="template-argument"),
        pytest.param(
            chat_job("bias", logit_bias={VOCABULARY: 1.0}), "logit_bias", str(VOCABULARY - 1), id="bias"
        ),
    ]


@pytest.mark.parametrize(("job", "param", "word"), bad_jobs())
def test_a_clients_mistake_is_an_invalid_request(loaded, job, param, word):
    (result,) = ask(loaded, job)
    assert (result.failed.code, result.failed.param) == ("invalid_request", param)
    assert word in result.failed.message
    assert "secret" not in result.failed.message


def test_the_generation_config_decides_what_a_request_leaves_out(tmp_path):
    folder = save_model(tmp_path, CONFIGS["llama"](), temperature=0.7, top_k=5, do_sample=True, max_length=3)
    engine, collector = make_engine(folder)
    try:
        (first, second) = run(
            engine,
            collector,
            [
                ChatJob(id=id, model="tiny", messages=[{"role": "user", "content": "hello"}], sampling=params)
                for id, params in {
                    "left out": SamplingParams(seed=3, max_tokens=20, ignore_eos=True),
                    "said": SamplingParams(seed=3, max_tokens=20, ignore_eos=True, temperature=0.7, top_k=5),
                }.items()
            ],
        )
        assert first.text() == second.text()
        assert first.usage.completion_tokens == 20
    finally:
        engine.close()


def test_a_cancelled_request_is_gone_within_two_steps(weights):
    engine, collector = make_engine(weights)
    try:
        ended: list[int] = []
        emit = engine._callback

        def watch(events):
            if any(id == "gone" and isinstance(event, Failed) for id, event in events):
                ended.append(engine.metrics.steps)
            emit(events)

        engine._callback = watch
        engine.submit(chat_job("other", max_tokens=900, ignore_eos=True))
        engine.submit(chat_job("gone", max_tokens=900, ignore_eos=True))
        collector.wait_first("gone")
        engine.cancel("gone", "cancelled")
        at = engine.metrics.steps
        collector.wait(lambda: ended)
        assert ended[0] - at <= 2
        assert collector.result("gone").failed.code == "cancelled"
        assert engine.status().running == 1
        assert 0 < (engine.status().kv_cache_usage or 0) < 1
        engine.cancel("other", "deadline")
        result = collector.result("other")
        assert result.finish() == ("length", None)
        assert 0 < result.usage.completion_tokens < 900
        assert engine.metrics.active_pages == 0 or engine.status().running == 0
        engine.cancel("nobody", "cancelled")
    finally:
        engine.close()


def test_a_deadline_before_the_first_token_fails(weights):
    engine, collector = make_engine(weights, max_batch_size=1)
    try:
        engine.submit(chat_job("running", max_tokens=900, ignore_eos=True))
        engine.submit(chat_job("waiting"))
        collector.wait_first("running")
        engine.cancel("waiting", "deadline")
        assert collector.result("waiting").failed.code == "deadline_exceeded"
    finally:
        engine.close()


class FailingForward:
    """Replaces the runner's forward and fails for selected steps."""

    def __init__(self, engine: ChatEngine, error: BaseException, fails: Any) -> None:
        self._forward = engine.parts.runner.forward
        self._error, self._fails = error, fails
        engine.parts.runner.forward = self  # type: ignore[method-assign, assignment]

    def __call__(self, chunks):
        if self._fails(chunks):
            raise self._error
        return self._forward(chunks)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out_of_memory"),
        (RuntimeError("broken"), "engine_error"),
    ],
)
def test_a_failure_ends_the_request_that_caused_it_and_no_other(weights, error, code):
    engine, collector = make_engine(weights, prefix_cache=False)
    try:
        good = chat_job("good", max_tokens=30, ignore_eos=True)
        (expected,) = run(engine, collector, [chat_job("alone", max_tokens=30, ignore_eos=True)])
        engine.parts.scheduler.step_overhead = (
            1000.0  # large, so that "bad" comes in one chunk on any machine
        )
        FailingForward(engine, error, lambda chunks: any(len(chunk.tokens) > 50 for chunk in chunks))
        result, failed = run(engine, collector, [good, chat_job("bad", "fox " * 100)])
        assert failed.failed.code == code
        assert "broken" not in failed.failed.message
        assert result.text() == expected.text()
        assert engine.status().alive
        assert engine.metrics.failures == 1
    finally:
        engine.close()


def test_a_failing_mask_ends_its_request_and_no_other(weights, monkeypatch):
    """Choices that were just forked are computed again and have the text they would have had."""

    class Broken:
        @property
        def first(self) -> Any:
            raise KeyError("broken")

    engine, collector = make_engine(weights)
    try:
        many: dict[str, Any] = {"temperature": 1.0, "seed": 2, "n": 3, "max_tokens": 12, "ignore_eos": True}
        (expected,) = run(engine, collector, [chat_job("alone", **many)])
        build = engine.parts.prompts.build

        def masked(job, is_cancelled):
            request = build(job, is_cancelled)
            if job.id == "bad":
                request.sequences[0].grammar = cast(Any, Broken())
            return request

        monkeypatch.setattr(engine.parts.prompts, "build", masked)
        engine.submit(chat_job("first", max_tokens=60, ignore_eos=True))
        result, failed = run(engine, collector, [chat_job("good", **many), chat_job("bad")])
        assert failed.failed.code == "engine_error"
        assert [result.text(index) for index in range(3)] == [expected.text(index) for index in range(3)]
        assert collector.result("first").usage.completion_tokens == 60
        assert engine.metrics.active_pages == 0 or engine.status().running == 0
    finally:
        engine.close()


def test_a_dead_thread_is_noticed_at_once_and_fails_all_requests(weights):
    engine, collector = make_engine(weights)
    engine.submit(chat_job("running", max_tokens=900, ignore_eos=True))
    collector.wait_first("running")
    FailingForward(engine, SystemExit("dead"), lambda chunks: True)
    assert collector.result("running").failed.code == "engine_stopped"
    assert engine._thread is not None
    engine._thread.join()
    assert not engine.status().alive
    assert collector.result("running").failed.code == "engine_stopped"
    engine.submit(chat_job("late"))
    assert collector.result("late").failed.code == "shutting_down"


def test_close_fails_what_still_runs(weights):
    engine, collector = make_engine(weights, max_batch_size=1)
    for id in ("running", "waiting"):
        engine.submit(chat_job(id, max_tokens=900, ignore_eos=True))
    collector.wait_first("running")
    engine.close()
    assert [collector.result(id).failed.code for id in ("running", "waiting")] == ["shutting_down"] * 2
    assert not engine.status().alive


@pytest.mark.parametrize("tokens", [1, 20], ids=["the last event is lost", "the first tokens are lost"])
def test_a_request_whose_events_are_lost_fails_and_the_others_go_on(weights, tokens):
    engine, collector = make_engine(weights)
    try:
        broken = threading.Event()

        def emit(events):
            if not broken.is_set() and "lost" in dict(events):
                broken.set()
                raise ConnectionError("lost")
            collector(events)

        engine._callback = emit
        engine.submit(chat_job("other", max_tokens=60, ignore_eos=True))
        collector.wait_first("other")
        engine.submit(chat_job("lost", max_tokens=tokens, ignore_eos=True))
        assert collector.result("lost").failed.code == "engine_error"
        assert len(collector.events["lost"]) == 1
        engine.submit(chat_job("after", max_tokens=2, ignore_eos=True))
        assert collector.result("after").usage.completion_tokens == 2
    finally:
        engine.close()


def test_an_engine_that_can_send_nothing_ends(weights):
    engine, _ = make_engine(weights)
    ended = threading.Event()

    def emit(events):
        if any(isinstance(event, Failed) for _, event in events):
            ended.set()
        raise ConnectionError("lost")

    engine._callback = emit
    engine.submit(chat_job("lost", max_tokens=20, ignore_eos=True))
    assert ended.wait(60)
    engine._thread.join(60)
    assert not engine.status().alive
    engine.close()


def refused() -> list[Any]:
    t5 = T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, architectures=["T5Model"]
    )
    mamba = MambaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, architectures=["MambaForCausalLM"]
    )
    longrope = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
        rope_parameters={
            "rope_type": "dynamic",
            "factor": 4.0,
            "rope_theta": 1e4,
            "original_max_position_embeddings": 64,
        },
    )
    sinks = GptOssConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=1,
    )
    return [
        pytest.param(sinks, "GptOssForCausalLM can't be served: .*s_aux", id="attention-sinks"),
        pytest.param(t5, "T5Model is an encoder-decoder", id="t5"),
        pytest.param(mamba, "MambaForCausalLM", id="mamba"),
        pytest.param(longrope, "dynamic positions", id="dynamic-rope"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("config", "words"), refused())
def test_what_cannot_be_served_is_refused_by_name(tmp_path, config, words):
    if config.is_encoder_decoder:
        config.save_pretrained(tmp_path)
    else:
        save_model(tmp_path, config)
    with pytest.raises(EngineLoadError, match=words):
        make_engine(tmp_path)


def test_a_load_ends_with_one_line_about_what_serves_the_model(weights, caplog):
    with caplog.at_level(logging.INFO):
        engine, _ = make_engine(weights, kv_cache_tokens=480)
    engine.close()
    (line,) = [record.getMessage() for record in caplog.records]
    assert re.fullmatch(
        r"tiny loaded in \d+\.\d s: CPU, float32 \(as the checkpoint\), attention by compiled loops,"
        r" no CUDA graphs, KV cache of 480 tokens, context of 480 tokens",
        line,
    )


def test_missing_weights_are_refused_in_one_line(tmp_path):
    with pytest.raises(EngineLoadError, match="nowhere") as caught:
        make_engine(tmp_path / "nowhere")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_a_checkpoint_that_lacks_a_weight_is_refused_naming_it(weights, tmp_path, key):
    shutil.copytree(weights, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[key]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        EngineLoadError, match=f"tiny: the weights of the LlamaForCausalLM lack {re.escape(key)}$"
    ):
        make_engine(tmp_path)


@pytest.mark.parametrize("kind", ["cut", "pointer"])
def test_a_weights_file_that_is_not_whole_is_refused_in_one_line(weights, tmp_path, kind):
    shutil.copytree(weights, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    file.write_bytes(file.read_bytes()[:-1000] if kind == "cut" else pointer)
    with pytest.raises(EngineLoadError, match="cut off or not a safetensors file") as caught:
        make_engine(tmp_path)
    assert "\n" not in str(caught.value)


def test_attention_that_differs_is_found_before_the_first_request(weights, monkeypatch):
    """A model whose attention this engine would compute wrongly must not be served."""
    right = CpuPagedAttention._decode
    monkeypatch.setattr(CpuPagedAttention, "_decode", lambda *args: right(*args) * 1.05)
    with pytest.raises(EngineLoadError, match="LlamaForCausalLM"):
        make_engine(weights)
