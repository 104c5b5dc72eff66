"""Requests share the steps of an engine and two workers share a queue, as the step counters show."""

import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from protocol.leases import Leases
from protocol.names import Keys
from tests.deployment import ROOT, Deployment, wait_until
from tests.e2e.conftest import CHAT, PROJECT, SHAPES

QUESTIONS = ["Hello!", "What is a worker?", "How do I stream?", "Which port do you listen on?"]
NEAR_TIE = 1e-4


def ask(demo: Deployment, question: str) -> dict[str, Any]:
    status, answer = demo.chat(question, CHAT, temperature=0)
    assert status == 200, answer
    return answer


def reported_steps(demo: Deployment) -> dict[str, int]:
    """Wait until each worker renews its lease; return the step counters of the chat workers by cid."""
    redis = demo.redis.client
    waiting = {name: redis.pttl(name) for name in redis.scan_iter(f"{PROJECT}:lease:*")}

    def all_renewed() -> bool:
        # A time to live goes up only by a renewal.
        for name, ttl in list(waiting.items()):
            waiting[name] = redis.pttl(name)
            if waiting[name] > ttl:
                del waiting[name]
        return not waiting

    wait_until(all_renewed, timeout_s=20, what="every worker renews its lease")
    records = Leases(redis, Keys.of(PROJECT)).workers()
    return {record.cid: record.steps for record in records if record.model == CHAT}


@pytest.mark.slow
def test_sixteen_chats_share_steps_and_both_workers_serve(demo: Deployment) -> None:
    before = reported_steps(demo)
    with ThreadPoolExecutor(16) as callers:
        answers = list(callers.map(lambda _: ask(demo, "Count to thirty."), range(16)))
    after = reported_steps(demo)
    tokens = sum(answer["usage"]["completion_tokens"] for answer in answers)
    spent = {cid: after[cid] - before[cid] for cid in after}
    assert len({answer["choices"][0]["message"]["content"] for answer in answers}) == 1
    assert all(count > 0 for count in spent.values()), f"both workers must serve some of them: {spent}"
    assert sum(spent.values()) < tokens / 2, f"{tokens} tokens in {spent} steps: one at a time"


def test_workers_log_what_they_loaded(demo: Deployment) -> None:
    logs = "".join(worker.log.read_text() for worker in demo.workers.values())
    chat = (
        rf"{CHAT} loaded in [0-9.]+ s: CPU, float32 \(as the checkpoint\), attention by .+, no CUDA graphs,"
        r" KV cache of 32\d+ tokens"
    )
    assert len(re.findall(chat, logs)) == 2
    assert re.search(rf"{SHAPES} loaded in [0-9.]+ s: CPU, float32, images of 64 pixels a side", logs)


def test_greedy_equals_generate(demo: Deployment) -> None:
    """Equals `model.generate`. One answer may differ after a choice between near-equal logits."""
    # Not at the top: every test process reads this file, and one runs the test.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = ROOT / "demo/models/chat"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    near_ties = 0
    with ThreadPoolExecutor(4) as callers:
        answers = list(callers.map(lambda question: ask(demo, question), QUESTIONS))
    for question, answer in zip(QUESTIONS, answers, strict=True):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        made = model.generate(
            **prompt, do_sample=False, max_new_tokens=128, output_logits=True, return_dict_in_generate=True
        )
        tokens = made.sequences[0, prompt["input_ids"].shape[1] :]
        expected = tokenizer.decode(tokens, skip_special_tokens=True)
        margins = [float(best[0] - best[1]) for best in (row[0].topk(2).values for row in made.logits)]
        if answer["choices"][0]["message"]["content"] != expected:
            assert min(margins) < NEAR_TIE, f"{question!r} differs and no choice was close"
            near_ties += 1
    assert near_ties <= 1
