// Reads a streamed chat completion.

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
  for await (const data of events(response.body, signal)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Refused(chunk.code, chunk.message, chunk.error.code);
    onChunk(chunk);
  }
  throw new BrokenOff("the stream ended before the service said that the answer was complete");
}

/** Yield the data of each server-sent event; comments are left out. An event that is cut off is no event. */
async function* events(stream, signal) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await next(reader, signal);
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const lines = part.split("\n").filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function next(reader, signal) {
  try {
    return await reader.read();
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new BrokenOff("the connection broke in the middle of the answer");
  }
}
