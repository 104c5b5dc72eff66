// A conversation with a model: its state, and what can be done with it.

import { Store } from "./playground-store.js";
import { streamChat } from "./playground-stream.js";
import { numbersOf } from "./playground-fields.js";

/** The fields of a request that are numbers, by their names in it. Those left empty are not sent. */
export const NUMBERS = { temperature: "Temperature", top_p: "Top p", max_tokens: "Max tokens", seed: "Seed" };

const EMPTY = { messages: [], draft: "", attached: [], problem: "", running: null };

/**
 * `messages`: each with `id`, `role` and `content`; those of the user with `images`, as data: URLs, answers with what
 * `newAnswer` gives them. `attached`: the images of the next message. `running`: the AbortController of the answer
 * that is being made, or null.
 */
export const chat = new Store({
  ...EMPTY,
  params: { model: "", system: "", temperature: "", top_p: "", max_tokens: "", seed: "" },
});

let lastId = 0;

/** `state`: "streaming", "complete", "stopped" or "failed". Times are milliseconds since the request was sent. */
function newAnswer(model) {
  return {
    id: (lastId += 1),
    role: "assistant",
    content: "",
    reasoning: "",
    model,
    state: "streaming",
    problem: "",
    finish: null,
    timings: { first_token_ms: null, total_ms: null },
    tokens: null,
  };
}

/** Send the draft and what is attached to it. */
export function submit() {
  const { draft, attached, messages, running } = chat.state;
  if (running || !(draft.trim() || attached.length)) return;
  const message = { id: (lastId += 1), role: "user", content: draft, images: attached };
  ask([...messages, message], { draft: "", attached: [] });
}

/** Attach image files to the next message. */
export async function attach(files) {
  try {
    const urls = await Promise.all([...files].map(dataUrl));
    chat.set({ attached: [...chat.state.attached, ...urls], problem: "" });
  } catch {
    chat.set({ problem: "This browser can't read the file." });
  }
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

/** Ask for another answer to the last message of the user. */
export function retry() {
  const { messages, running } = chat.state;
  if (!running) ask(messages.slice(0, -1));
}

/** End the answer that is being made. The connection closes, and with it the worker stops. */
export function stop() {
  chat.state.running?.abort();
}

/** Begin a new conversation. */
export function clear() {
  stop();
  chat.set(EMPTY);
}

/** Ask for an answer to the last of `messages`. `fields`: what else changes in the state once that has begun. */
async function ask(messages, fields = {}) {
  const { params } = chat.state;
  let body;
  try {
    body = { model: params.model, messages: history(params.system, messages), ...numbersOf(params, NUMBERS) };
  } catch (error) {
    chat.set({ problem: error.message });
    return;
  }
  const answer = newAnswer(params.model);
  const running = new AbortController();
  chat.set({ messages: [...messages, answer], running, problem: "", ...fields });
  const began = performance.now();
  const onChunk = (chunk) => {
    add(answer, chunk, performance.now() - began);
    chat.touch();
  };
  try {
    await streamChat(body, { signal: running.signal, onChunk });
    answer.state = "complete";
  } catch (error) {
    answer.state = running.signal.aborted ? "stopped" : "failed";
    answer.problem = running.signal.aborted ? "" : error.message;
  }
  answer.timings.total_ms ??= performance.now() - began;
  if (chat.state.running === running) chat.set({ running: null });
}

/** Add a chunk to an answer. `ms`: when it came. */
function add(answer, chunk, ms) {
  const choice = chunk.choices[0];
  if (choice) {
    const { content, reasoning_content: reasoning } = choice.delta;
    if (content || reasoning) answer.timings.first_token_ms ??= ms;
    answer.content += content ?? "";
    answer.reasoning += reasoning ?? "";
    answer.finish = choice.finish_reason ?? answer.finish;
  }
  // the service's own figures are without the way over the network
  if (chunk.timings) answer.timings = { ...chunk.timings };
  if (chunk.usage) answer.tokens = chunk.usage.completion_tokens;
}

/** The messages of a request. A question whose answer failed before its first word is left out with it. */
function history(system, messages) {
  const sent = system.trim() ? [{ role: "system", content: system }] : [];
  messages.forEach((message, place) => {
    const answer = message.role === "user" ? messages[place + 1] : message;
    if (answer && !answer.content) return;
    sent.push({ role: message.role, content: contentOf(message) });
  });
  return sent;
}

function contentOf({ content, images = [] }) {
  if (images.length === 0) return content;
  const parts = images.map((url) => ({ type: "image_url", image_url: { url } }));
  return content.trim() ? [...parts, { type: "text", text: content }] : parts;
}
