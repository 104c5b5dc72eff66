// openai-node, unmodified: chats, streams, parsed answers, tools that it calls by itself, images, errors.
import assert from "node:assert/strict";
import { test } from "node:test";

import OpenAI, { toFile } from "openai";
import { zodFunction, zodResponseFormat } from "openai/helpers/zod";

import { ABSENT_MODEL, BALL, collect, LIMITED_URL, Numbers, Point, SERVICE_KEY, SERVICE_URL } from "./service.mjs";

const client = new OpenAI({ baseURL: SERVICE_URL, apiKey: SERVICE_KEY, maxRetries: 0, timeout: 60_000 });
const asking = (content, model = "scripted") => ({ model, messages: [{ role: "user", content }] });

test("chat", async () => {
  const answer = await client.chat.completions.create(asking("Hello!"));
  assert.equal(answer.choices[0].message.content, "Hello! How can I help you?");
  assert.equal(answer.choices[0].finish_reason, "stop");
  assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens);
});

test("stream with usage", async () => {
  const request = { ...asking("Count to twelve."), stream: true, stream_options: { include_usage: true } };
  const chunks = await collect(await client.chat.completions.create(request));
  const text = chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join("");
  assert.match(text, /^One, two.* twelve\.$/);
  assert.ok(chunks.length > 5);
  assert.deepEqual(chunks.filter((chunk) => chunk.usage).length, 1);
  assert.ok(chunks.at(-1).usage.completion_tokens > 3);
});

test("stream helper", async () => {
  const stream = client.chat.completions.stream(asking("Count to twelve."));
  const deltas = [];
  stream.on("content", (delta) => deltas.push(delta));
  const final = await stream.finalChatCompletion();
  assert.ok(deltas.length > 3);
  assert.equal(deltas.join(""), final.choices[0].message.content);
  assert.equal(await stream.finalContent(), final.choices[0].message.content);
});

test("a stream can be aborted", async () => {
  const stream = await client.chat.completions.create({ ...asking("Count to twelve."), stream: true });
  for await (const chunk of stream) {
    assert.ok(chunk.id);
    stream.controller.abort();
  }
  assert.ok((await client.chat.completions.create(asking("Hello!"))).choices[0].message.content);
});

test("zodResponseFormat with parse", async () => {
  const format = { response_format: zodResponseFormat(Point, "point") };
  const answer = await client.chat.completions.parse({ ...asking("Where is the ball?"), ...format });
  assert.deepEqual(answer.choices[0].message.parsed, BALL);
});

test("zodResponseFormat with stream", async () => {
  const format = { response_format: zodResponseFormat(Point, "point") };
  const stream = client.chat.completions.stream({ ...asking("Where is the ball?"), ...format });
  const seen = [];
  stream.on("content.delta", ({ parsed }) => seen.push(parsed));
  stream.on("content.done", ({ parsed }) => seen.push(parsed));
  const final = await stream.finalChatCompletion();
  assert.deepEqual(final.choices[0].message.parsed, BALL);
  assert.deepEqual(seen.at(-1), BALL);
  assert.ok(seen.length > 2);
});

const calls = [];
const add = zodFunction({
  name: "add",
  parameters: Numbers,
  function: ({ a, b }) => {
    calls.push([a, b]);
    return a + b;
  },
});

// without `strict`, so that the model chooses the arguments
const freeAdd = {
  type: "function",
  function: {
    name: "add",
    description: "Add two numbers.",
    parameters: { type: "object", properties: { a: { type: "integer" }, b: { type: "integer" } } },
    parse: JSON.parse,
    function: ({ a, b }) => {
      calls.push([a, b]);
      return a + b;
    },
  },
};

test("runTools", async () => {
  calls.length = 0;
  const runner = client.chat.completions.runTools({ ...asking("What is 3 + 4?"), tools: [add] });
  assert.equal(await runner.finalContent(), "3 + 4 is 7.");
  assert.deepEqual(calls, [[3, 4]]);
  assert.ok((await runner.totalUsage()).completion_tokens > 3);
});

test("runTools with a stream and two calls at once", async () => {
  calls.length = 0;
  const request = { ...asking("What are 2 + 2 and 5 + 6?"), tools: [freeAdd], stream: true };
  const runner = client.chat.completions.runTools(request);
  const ids = [];
  runner.on("message", (message) => ids.push(...(message.tool_calls ?? []).map((call) => call.id)));
  assert.equal(await runner.finalContent(), "They are 4 and 11.");
  assert.deepEqual(calls, [[2, 2], [5, 6]]);
  assert.equal(new Set(ids).size, 2);
});

test("a named function is called", async () => {
  const answer = await client.chat.completions.parse({
    ...asking("Point at the ball."),
    tools: [add, zodFunction({ name: "Point", parameters: Point })],
    tool_choice: { type: "function", function: { name: "Point" } },
  });
  assert.deepEqual(answer.choices[0].message.tool_calls[0].function.parsed_arguments, BALL);
});

test("images", async () => {
  const options = { model: "shapes", response_format: "b64_json", n: 1 };
  const drawn = await client.images.generate({ ...options, prompt: "a red circle" });
  const png = Buffer.from(drawn.data[0].b64_json, "base64");
  assert.equal(png.subarray(1, 4).toString(), "PNG");
  const image = await toFile(png, "red.png", { type: "image/png" });
  const edited = await client.images.edit({ ...options, image, prompt: "a blue circle" });
  assert.equal(Buffer.from(edited.data[0].b64_json, "base64").subarray(1, 4).toString(), "PNG");
});

test("image streams", async () => {
  const options = { model: "shapes", stream: true, partial_images: 2 };
  const made = await collect(await client.images.generate({ ...options, prompt: "a red circle", seed: 3, steps: 6 }));
  assert.deepEqual(made.map((event) => [event.type, event.partial_image_index]), [
    ["image_generation.partial_image", 0],
    ["image_generation.partial_image", 1],
    ["image_generation.completed", undefined],
  ]);
  const [preview, , final] = made.map((event) => Buffer.from(event.b64_json, "base64"));
  assert.deepEqual([preview.subarray(0, 2).toString("hex"), final.subarray(1, 4).toString()], ["ffd8", "PNG"]);
  assert.equal(made.at(-1).usage.total_tokens, 0);
  const image = await toFile(final, "red.png", { type: "image/png" });
  const edited = await collect(await client.images.edit({ ...options, image, prompt: "a blue circle" }));
  assert.equal(edited[0].type, "image_edit.partial_image");
  assert.equal(edited.at(-1).type, "image_edit.completed");
});

test("an image stream that breaks off", async () => {
  const request = { model: "echo-images", prompt: "raise after three tokens", stream: true, partial_images: 1 };
  const events = await client.images.generate(request);
  const seen = [];
  const read = async () => {
    for await (const event of events) seen.push(event.type);
  };
  await assert.rejects(read, (error) => error instanceof OpenAI.APIError && error.code === "engine_error");
  assert.deepEqual(seen, ["image_generation.partial_image"]);
});

test("models", async () => {
  const ids = (await collect(client.models.list())).map((model) => model.id);
  assert.ok(ids.includes("scripted") && ids.includes("shapes"));
  assert.equal((await client.models.retrieve("scripted")).id, "scripted");
});

test("a stream that breaks off", async () => {
  const request = asking("raise after three tokens", "echo");
  let text = "";
  const read = async () => {
    for await (const chunk of await client.chat.completions.create({ ...request, stream: true })) {
      text += chunk.choices[0].delta.content ?? "";
    }
  };
  const isEngineError = (error) => error instanceof OpenAI.APIError && error.code === "engine_error";
  await assert.rejects(read, isEngineError);
  assert.equal(text, "0 1 2 ");
  await assert.rejects(client.chat.completions.stream(request).finalContent(), isEngineError);
});

const create = (request, options) => client.chat.completions.create(request, options);

for (const [kind, code, request] of [
  [OpenAI.BadRequestError, "context_length_exceeded", asking("word ".repeat(2000))],
  [OpenAI.BadRequestError, "invalid_request", { ...asking("Hello!"), temperature: 9 }],
  [OpenAI.NotFoundError, "model_not_found", asking("Hello!", "gpt-9")],
  [OpenAI.InternalServerError, "no_worker", asking("Hello!", ABSENT_MODEL)],
  [OpenAI.InternalServerError, "engine_error", asking("raise", "echo")],
]) {
  for (const stream of [false, true]) {
    test(`${kind.name} ${code}, stream: ${stream}`, async () => {
      await assert.rejects(create({ ...request, stream }), (error) => {
        assert.ok(error instanceof kind, `${error}`);
        assert.equal(error.code, code);
        assert.ok(error.requestID);
        return true;
      });
    });
  }
}

test("AuthenticationError and RateLimitError", async () => {
  await assert.rejects(client.withOptions({ apiKey: "wrong" }).models.list(), OpenAI.AuthenticationError);
  const limited = client.withOptions({ baseURL: LIMITED_URL });
  await assert.rejects(limited.chat.completions.create(asking("Hello!")), OpenAI.RateLimitError);
});
