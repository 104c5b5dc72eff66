// The Vercel AI SDK with its provider for OpenAI-compatible services, both unmodified.
import assert from "node:assert/strict";
import { test } from "node:test";

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import {
  APICallError, generateImage, generateObject, generateText, stepCountIs, streamObject, streamText, tool,
} from "ai";
import { z } from "zod";

import { ABSENT_MODEL, BALL, collect, LIMITED_URL, Point, SERVICE_KEY, SERVICE_URL } from "./service.mjs";

const provider = (settings) =>
  createOpenAICompatible({
    name: "service", baseURL: SERVICE_URL, apiKey: SERVICE_KEY,
    supportsStructuredOutputs: true, includeUsage: true, ...settings,
  });
const service = provider({});
const asking = (prompt, model = "scripted") => ({ model: service(model), prompt, maxRetries: 0 });
const add = tool({
  description: "Add two numbers.",
  inputSchema: z.object({ a: z.number().int(), b: z.number().int() }),
  execute: async ({ a, b }) => a + b,
});

test("generateText", async () => {
  const { text, usage, finishReason } = await generateText(asking("Hello!"));
  assert.equal(text, "Hello! How can I help you?");
  assert.equal(finishReason, "stop");
  assert.ok(usage.outputTokens > 3);
});

test("streamText", async () => {
  const result = streamText(asking("Count to twelve."));
  const pieces = await collect(result.textStream);
  assert.ok(pieces.length > 3);
  assert.match(pieces.join(""), /^One, two.* twelve\.$/);
  assert.ok((await result.usage).outputTokens > 3);
});

test("reasoning", async () => {
  const whole = await generateText(asking("What is 2 + 2?", "thinking"));
  assert.deepEqual([whole.reasoningText.trim(), whole.text.trim()], ["Two and two.", "It is 4."]);
  const result = streamText(asking("What is 2 + 2?", "thinking"));
  const kinds = (await collect(result.fullStream)).map((part) => part.type);
  assert.ok(kinds.indexOf("reasoning-end") < kinds.indexOf("text-start"));
  assert.equal((await result.reasoningText).trim(), "Two and two.");
});

test("generateObject", async () => {
  const { object } = await generateObject({ ...asking("Where is the ball?"), schema: Point });
  assert.deepEqual(object, BALL);
});

test("generateObject with a list of choices", async () => {
  const request = { ...asking("Where is the ball?"), output: "enum", enum: ["here"] };
  assert.equal((await generateObject(request)).object, "here");
});

test("streamObject", async () => {
  const result = streamObject({ ...asking("Where is the ball?"), schema: Point });
  const partial = await collect(result.partialObjectStream);
  assert.deepEqual(partial.at(-1), BALL);
  assert.deepEqual(await result.object, BALL);
});

test("tools with generateText", async () => {
  const options = { tools: { add }, stopWhen: stepCountIs(3) };
  const { text, steps } = await generateText({ ...asking("What is 3 + 4?"), ...options });
  assert.equal(text, "3 + 4 is 7.");
  assert.deepEqual(steps[0].toolCalls.map((call) => call.input), [{ a: 3, b: 4 }]);
  assert.equal(steps[0].finishReason, "tool-calls");
});

test("tools with streamText and two calls at once", async () => {
  const options = { tools: { add }, stopWhen: stepCountIs(3) };
  const result = streamText({ ...asking("What are 2 + 2 and 5 + 6?"), ...options });
  const parts = await collect(result.fullStream);
  assert.deepEqual(parts.filter((part) => part.type === "error"), []);
  assert.ok(parts.filter((part) => part.type === "tool-input-delta").length > 2);
  assert.deepEqual((await result.steps)[0].toolResults.map(({ output }) => output), [4, 11]);
  assert.equal(await result.text, "They are 4 and 11.");
});

test("toolChoice", async () => {
  const tools = { add, point: tool({ inputSchema: Point }) };
  for (const toolChoice of ["required", { type: "tool", toolName: "point" }]) {
    const offered = toolChoice === "required" ? { point: tools.point } : tools;
    const { toolCalls } = await generateText({ ...asking("Point at the ball."), tools: offered, toolChoice });
    assert.deepEqual(toolCalls.map(({ toolName, input }) => [toolName, input]), [["point", BALL]]);
  }
});

test("generateImage", async () => {
  const model = service.imageModel("shapes");
  const { image } = await generateImage({ model, prompt: "a red circle", size: "64x64", maxRetries: 0 });
  assert.equal(image.mediaType, "image/png");
});

test("a stream that breaks off", async () => {
  const errors = [];
  const onError = ({ error }) => errors.push(error);
  const result = streamText({ ...asking("raise after three tokens", "echo"), onError });
  const parts = await collect(result.fullStream);
  const text = parts.filter((part) => part.type === "text-delta").map((part) => part.text);
  assert.equal(text.join(""), "0 1 2 ");
  assert.equal(parts.filter((part) => part.type === "error").length, 1);
  assert.match(JSON.stringify(errors), /failed on this request/);
  assert.equal(await result.finishReason, "error");
});

for (const [status, code, request] of [
  [400, "context_length_exceeded", asking("word ".repeat(2000))],
  [404, "model_not_found", asking("Hello!", "gpt-9")],
  [503, "no_worker", asking("Hello!", ABSENT_MODEL)],
  [401, "invalid_api_key", { ...asking("Hello!"), model: provider({ apiKey: "wrong" })("scripted") }],
  [429, "rate_limit_exceeded", { ...asking("Hello!"), model: provider({ baseURL: LIMITED_URL })("scripted") }],
]) {
  test(`${status} ${code}`, async () => {
    await assert.rejects(generateText(request), (error) => {
      assert.ok(APICallError.isInstance(error), `${error}`);
      assert.equal(error.statusCode, status);
      assert.equal(error.data.error.code, code);
      assert.equal(error.isRetryable, status >= 429);
      return true;
    });
  });
}
