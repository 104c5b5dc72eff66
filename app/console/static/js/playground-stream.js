// Reads streamed answers: chats and images.

import { Refused, send } from "./api.js";

/** The stream ended before the service said that the answer was complete. */
export class BrokenOff extends Error {}

/**
 * Request a chat completion as a stream and call `onChunk(chunk)` for each of its chunks.
 *
 * Returns when the answer is complete. Throws Refused for an error of the service, also in the middle of the answer,
 * BrokenOff for a stream without [DONE], Unreachable, and AbortError if `signal` was aborted.
 */
export async function streamChat(body, { signal, onChunk }) {
  const response = await send("v1/chat/completions", { method: "POST", json: { ...body, stream: true }, signal });
  for await (const { data } of events(response.body, signal)) {
    if (data === "[DONE]") return;
    if (data) onChunk(parse(data));
  }
  throw new BrokenOff("the stream ended before the service said that the answer was complete");
}

/**
 * Request `count` images as a stream from `path`, with `options` of `send`. Calls `onStep(step, total)` after each of
 * their steps, and `onImage(event)` for each preview and each finished image.
 *
 * Returns when all images have come. Throws as `streamChat` does, BrokenOff if images are missing.
 */
export async function streamImages(path, options, { count, onStep, onImage }) {
  const response = await send(path, { method: "POST", ...options });
  let missing = count;
  for await (const { data, comment } of events(response.body, options.signal)) {
    const step = /^step (\d+) of (\d+)$/.exec(comment);
    if (step) onStep(Number(step[1]), Number(step[2]));
    if (!data) continue;
    const event = parse(data);
    if (event.type.endsWith(".completed")) missing -= 1;
    onImage(event);
  }
  if (missing > 0) throw new BrokenOff("the stream ended before all images had come");
}

function parse(data) {
  const event = JSON.parse(data);
  if (event.error) throw new Refused(event.code, event.message, event.error.code);
  return event;
}

/** Yield `{ data, comment }` of each server-sent event or comment, as text. What is cut off is none. */
async function* events(stream, signal) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await next(reader, signal);
      if (done) return;
      rest += value;
      // without a line break it can't be complete: an image of some MiB comes in many pieces
      if (!value.includes("\n")) continue;
      const parts = rest.split("\n\n");
      rest = parts.pop();
      for (const part of parts) yield { data: linesOf(part, "data:"), comment: linesOf(part, ":") };
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** What follows the name of a field in the lines that have it; comments are lines without a name. */
function linesOf(part, name) {
  const lines = part.split("\n").filter((line) => line.startsWith(name));
  return lines.map((line) => line.slice(name.length).trimStart()).join("\n");
}

async function next(reader, signal) {
  try {
    return await reader.read();
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new BrokenOff("the connection broke in the middle of the answer");
  }
}
