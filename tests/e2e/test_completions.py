"""Completions of plain prompts, and the tokenizer's endpoints, as evaluation harnesses use them."""

from typing import Any

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.deployment import ROOT, Deployment
from tests.e2e.conftest import CHAT, SHAPES

WEIGHTS = ROOT / "demo" / "models" / "chat"
PAIRS = [("Hello!", " How can I help"), ("Count to thirty.", " 1, 2, 3"), ("Who are", " you?")]
"""Contexts, and continuations whose likelihoods are asked for."""
ASKED = "<|user|>Hello!<|end|><|assistant|>"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(WEIGHTS)


@torch.inference_mode()
def likelihoods(context: list[int], continuation: list[int]) -> tuple[list[float], bool]:
    """Transformers' own: the log probability of each token, and whether each is the most probable one."""
    model = AutoModelForCausalLM.from_pretrained(WEIGHTS, dtype=torch.float32).eval()
    logits = model(torch.tensor([context + continuation])).logits[0].log_softmax(-1)
    places = range(len(context) - 1, len(context) + len(continuation) - 1)
    own = [float(logits[at, token]) for at, token in zip(places, continuation, strict=True)]
    return own, all(int(logits[at].argmax()) == token for at, token in zip(places, continuation, strict=True))


def test_a_harness_can_score(client: openai.OpenAI, tokenizer: Any) -> None:
    """lm-evaluation-harness sends this for `local-completions`, and reads the answer in this way."""
    encoded = [tuple(tokenizer(part)["input_ids"] for part in pair) for pair in PAIRS]
    answer = client.completions.create(
        model=CHAT,
        prompt=[context + continuation for context, continuation in encoded],
        temperature=0,
        max_tokens=1,
        logprobs=1,
        seed=1234,
        echo=True,
    )
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(len(one) + len(other) for one, other in encoded)
    for index, (choice, (context, continuation)) in enumerate(zip(answer.choices, encoded, strict=True)):
        assert choice.index == index and choice.text.startswith("".join(PAIRS[index]))
        found: Any = choice.logprobs
        own = found.token_logprobs[len(context) : -1]
        best = [max(top.values()) for top in found.top_logprobs[len(context) : -1]]
        expected, greedy = likelihoods(context, continuation)
        assert own == pytest.approx(expected, abs=1e-4)
        assert (own == best) is greedy
        assert found.token_logprobs[0] is None
        assert [choice.text[at] for at in found.text_offset[:2]] == [token[0] for token in found.tokens[:2]]


def test_streamed_prompts_give_the_plain_answers(client: openai.OpenAI) -> None:
    fields: Any = {"model": CHAT, "prompt": ["Hello", "Who are"], "temperature": 0, "max_tokens": 9}
    fields |= {"echo": True, "logprobs": 0, "n": 2, "seed": 1}
    plain = client.completions.create(**fields)
    chunks = list(client.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage == plain.usage and chunks[-1].choices == []
    for choice in plain.choices:
        parts = [each for chunk in chunks for each in chunk.choices if each.index == choice.index]
        assert "".join(part.text for part in parts) == choice.text
        assert parts[-1].finish_reason == choice.finish_reason
        assert choice.logprobs is not None
        for name in ("tokens", "token_logprobs", "text_offset"):
            streamed = [value for part in parts if part.logprobs for value in getattr(part.logprobs, name)]
            assert streamed == getattr(choice.logprobs, name)


def test_stop_and_format(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=CHAT, prompt=ASKED, temperature=0, max_tokens=12).choices[0]
    stopped = client.completions.create(
        model=CHAT, prompt=ASKED, temperature=0, max_tokens=12, stop=whole.text[4:7]
    ).choices[0]
    assert stopped.text == whole.text[: whole.text.index(whole.text[4:7])]
    assert stopped.finish_reason == "stop"
    chosen = client.completions.create(
        model=CHAT, prompt="Pick:", extra_body={"guided_choice": ["yes", "no"]}
    )
    assert chosen.choices[0].text in ("yes", "no")


def test_one_bad_prompt_fails_the_request_and_cancels_the_others(
    demo: Deployment, client: openai.OpenAI
) -> None:
    with pytest.raises(openai.BadRequestError, match="the prompt is empty"):
        client.completions.create(
            model=CHAT, prompt=["Hello!", ""], max_tokens=4000, extra_body={"ignore_eos": True}
        )
    assert client.completions.create(model=CHAT, prompt=ASKED, max_tokens=1).choices[0].text
    for name in ("suffix", "best_of"):
        with pytest.raises(openai.BadRequestError, match=name):
            client.completions.create(model=CHAT, prompt="Hello!", extra_body={name: 2})
    status, body = demo.post("/v1/completions", {"model": SHAPES, "prompt": "a"})
    assert (status, body["error"]["param"]) == (400, "model")


@pytest.mark.parametrize(
    ("last", "code"),
    [("word " * 9000, "context_length_exceeded"), ([5] * 4096, "context_length_exceeded"), ([10**8], "")],
    ids=["text", "tokens", "unknown token"],
)
def test_a_stream_with_a_bad_prompt_is_refused_before_it_begins(
    demo: Deployment, last: Any, code: str
) -> None:
    """The last prompt waits in the queue, as workers have fewer slots than there are prompts."""
    first = "Hello!" if isinstance(last, str) else [5, 6]
    body = {"model": CHAT, "prompt": [first] * 127 + [last], "stream": True, "max_tokens": 50}
    status, refused = demo.post("/v1/completions", body)
    assert (status, refused["error"]["param"]) == (400, "prompt")
    assert refused["error"]["code"] == (code or "invalid_request")


def test_tokenize_and_detokenize(demo: Deployment, tokenizer: Any) -> None:
    text = "<|user|>Hello, wörld!"
    status, found = demo.post("/tokenize", {"model": CHAT, "prompt": text, "return_token_strs": True})
    ids = tokenizer(text)["input_ids"]
    assert (status, found["tokens"], found["count"]) == (200, ids, len(ids))
    assert found["token_strs"] == tokenizer.convert_ids_to_tokens(ids)
    (row,) = [row for row in demo.get("/v1/models")[1]["data"] if row["id"] == CHAT]
    assert found["max_model_len"] == row["max_model_len"]
    messages = [{"role": "user", "content": "Hello<|end|>"}]
    status, chat = demo.post("/tokenize", {"messages": messages})
    assert status == 200 and chat["token_strs"] is None
    plain = demo.post("/tokenize", {"messages": messages, "add_generation_prompt": False})[1]
    assert chat["tokens"][: plain["count"]] == plain["tokens"] and chat["count"] > plain["count"]
    assert chat["tokens"].count(tokenizer.convert_tokens_to_ids("<|end|>")) == 1
    assert demo.post("/detokenize", {"model": CHAT, "tokens": ids})[1]["prompt"] == text
    status, refused = demo.post("/detokenize", {"tokens": [1, 10**8]})
    assert (status, refused["error"]["param"]) == (400, "tokens")
