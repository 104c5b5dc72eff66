// The chat: messages, the field for the next one, and the parameters beside them.

import { count, duration, rate } from "./format.js";
import { attach, chat, clear, retry, stop, submit } from "./playground-chat.js";
import { Aside, ModelField, NumberField, setParam, TextField } from "./playground-fields.js";
import { Markdown } from "./playground-markdown.js";
import { useStore } from "./playground-store.js";
import { html, Notice } from "./ui.js";
import { useEffect, useLayoutEffect, useRef, useState } from "../vendor/preact-hooks.js";

const SPOKEN = 600;
const NEAR_END_PX = 120;

/** The panel. `models`: the rows of /v1/models that can chat. */
export function Chat({ models }) {
  const { messages, params, problem, running } = useStore(chat);
  const last = messages.at(-1);
  useEffect(() => {
    if (!models.some(({ id }) => id === params.model)) setParam(chat, "model", models[0]?.id ?? "");
  }, [models]);
  useFollow(messages.length, last);

  return html`<div class="bench">
    <${Parameters} models=${models} />
    <div class="talk">
      ${messages.length === 0
        ? html`<p class="hint">Nothing is kept: the conversation ends with this page.</p>`
        : html`<ol class="messages" aria-label="Conversation">
            ${messages.map((message) => html`<${Message} key=${message.id} message=${message} last=${message === last} busy=${!!running} />`)}
          </ol>`}
      <p class="hidden" role="status">${spoken(last)}</p>
      ${problem && html`<${Notice} kind="error">${problem}<//>`}
      <${Composer} running=${running} empty=${messages.length === 0} sees=${sees(models, params.model)} />
    </div>
  </div>`;
}

/** Whether a model takes images, as far as its ready workers tell. */
function sees(models, name) {
  return models.find(({ id }) => id === name)?.input_modalities?.includes("image") ?? false;
}

/** What a screen reader is told: that an answer has begun, and the answer when it is complete, not each token. */
function spoken(last) {
  if (last?.role !== "assistant") return "";
  if (last.state === "streaming") return "The model is answering.";
  if (last.state === "failed") return "";
  const long = last.content.length > SPOKEN;
  return `${last.state === "stopped" ? "Stopped" : "Answer"}: ${last.content.slice(0, SPOKEN)}${long ? " …" : ""}`;
}

/** Keep the end of the conversation visible, unless the reader has scrolled away from it. */
function useFollow(number, last) {
  const page = document.scrollingElement;
  const following = useRef(true);
  useEffect(() => {
    const note = () => {
      following.current = page.scrollHeight - page.scrollTop - page.clientHeight < NEAR_END_PX;
    };
    window.addEventListener("scroll", note, { passive: true });
    return () => window.removeEventListener("scroll", note);
  }, []);
  useLayoutEffect(() => {
    if (number) page.scrollTop = page.scrollHeight;
  }, [number]);
  useLayoutEffect(() => {
    if (number && following.current) page.scrollTop = page.scrollHeight;
  }, [last?.content, last?.reasoning, last?.state]);
}

function Message({ message, last, busy }) {
  if (message.role === "user") {
    return html`<li class="message user"><span class="hidden">You: </span>${message.content}
      ${message.images.length > 0 && html`<span class="thumbs">${message.images.map((url) => html`<img src=${url} alt="Attached image" />`)}</span>`}
    </li>`;
  }
  const { content, reasoning, state } = message;
  const waiting = state === "streaming" && !content && !reasoning;
  return html`<li class="message answer ${state}" aria-busy=${state === "streaming"}>
    <span class="hidden">${message.model}: </span>
    ${waiting && html`<p class="waiting">Waiting for the first token …</p>`}
    ${reasoning && html`<${Reasoning} text=${reasoning} open=${state === "streaming" && !content} />`}
    ${content && html`<${Markdown} text=${content} />`}
    ${message.problem && html`<${Notice} kind="error">${sentence(message, content || reasoning)}<//>`}
    ${state !== "streaming" && html`<${Foot} message=${message} last=${last} busy=${busy} />`}
  </li>`;
}

/** The service's own words, and what they mean for the text above. */
function sentence({ problem }, begun) {
  const words = `${problem.charAt(0).toUpperCase()}${problem.slice(1)}`.replace(/([^.!?…])$/, "$1.");
  return begun ? `${words} What has arrived is incomplete.` : words;
}

function Reasoning({ text, open }) {
  return html`<details class="reasoning"><summary>Reasoning${open ? " …" : ""}</summary><${Markdown} text=${text} /></details>`;
}

function Foot({ message, last, busy }) {
  return html`<div class="foot">
    <${Figures} message=${message} />
    <span class="buttons">
      ${message.content && html`<${Copy} text=${message.content} />`}
      ${last && !busy && html`<button type="button" class="quiet" onClick=${retry}>
        ${message.state === "complete" ? "Another answer" : "Try again"}</button>`}
    </span>
  </div>`;
}

function Figures({ message: { state, finish, timings, tokens, model } }) {
  const { first_token_ms: first, total_ms: total } = timings;
  const parts = [model];
  if (state === "stopped") parts.push("stopped");
  if (finish === "length") parts.push("cut off at the limit of tokens");
  if (first !== null) parts.push(`first token ${duration(first)}`);
  if (state !== "failed") parts.push(`total ${duration(total)}`);
  if (tokens !== null) parts.push(count(tokens, "token"));
  if (tokens > 1 && total > first) parts.push(rate(tokens - 1, total - first));
  return html`<span class="figures">${parts.map((part) => html`<span>${part}</span>`)}</span>`;
}

function Copy({ text }) {
  const [copied, setCopied] = useState(false);
  // browsers have a clipboard for pages only if they came by https or from the machine itself
  if (!navigator.clipboard) return null;
  const copy = async () => {
    await navigator.clipboard.writeText(text);
    setCopied(true);
    setTimeout(() => setCopied(false), 2000);
  };
  return html`<button type="button" class="quiet" onClick=${copy}>${copied ? "Copied" : "Copy"}</button>`;
}

function Composer({ running, empty, sees }) {
  const { draft, attached, params } = useStore(chat);
  const field = useRef(null);
  useLayoutEffect(() => {
    // grows with its text; the largest height is in the style sheet
    const rows = draft.split("\n").length;
    field.current.rows = Math.min(12, Math.max(2, rows));
  }, [draft]);

  const onSubmit = (event) => {
    event.preventDefault();
    submit();
    field.current.focus();
  };
  const onKeyDown = (event) => {
    // on a phone the key is the only way to a new line
    const fingers = matchMedia("(pointer: coarse)").matches;
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || fingers) return;
    event.preventDefault();
    submit();
  };
  const onPaste = (event) => {
    const files = [...event.clipboardData.files].filter(({ type }) => type.startsWith("image/"));
    if (!sees || files.length === 0) return;
    event.preventDefault();
    attach(files);
  };
  const ready = params.model && (draft.trim() || attached.length);
  return html`<form class="composer" onSubmit=${onSubmit}>
    ${(sees || attached.length > 0) && html`<${Attachments} attached=${attached} sees=${sees} />`}
    <label class="hidden" for="message">Message</label>
    <textarea id="message" ref=${field} rows="2" placeholder="Write a message" value=${draft} onKeyDown=${onKeyDown}
      onPaste=${onPaste} onInput=${(event) => chat.set({ draft: event.target.value })}></textarea>
    <div class="buttons">
      ${running
        ? html`<button type="button" class="stop" key="stop" onClick=${stop}>Stop</button>`
        : html`<button type="submit" class="primary" key="send" disabled=${!ready}>Send</button>`}
      ${!empty && html`<button type="button" class="quiet" onClick=${clear}>New chat</button>`}
    </div>
  </form>`;
}

/** The images of the next message. They stay if a model is chosen that takes none, and then refuses them. */
function Attachments({ attached, sees }) {
  const remove = (place) => chat.set({ attached: attached.filter((_, other) => other !== place) });
  return html`<div class="attachments">
    ${attached.map((url, place) => html`<span class="thumb" key=${`${place}${url.length}`}>
      <img src=${url} alt="Image ${place + 1} of the next message" />
      <button type="button" aria-label="Remove image ${place + 1}" onClick=${() => remove(place)}>✕</button></span>`)}
    ${sees && html`<label class="file"><span>Attach images</span>
      <input type="file" class="hidden" multiple accept="image/png,image/jpeg,image/webp" onChange=${(event) => {
        attach(event.target.files);
        event.target.value = "";
      }} /></label>`}
  </div>`;
}

function Parameters({ models }) {
  return html`<${Aside} title="Parameters">
    <${ModelField} store=${chat} models=${models} />
    <${TextField} store=${chat} name="system" label="System prompt" placeholder="none" />
    <div class="pair">
      <${NumberField} store=${chat} name="temperature" label="Temperature" />
      <${NumberField} store=${chat} name="top_p" label="Top p" />
      <${NumberField} store=${chat} name="max_tokens" label="Max tokens" whole=${true} />
      <${NumberField} store=${chat} name="seed" label="Seed" whole=${true} empty="random" />
    </div>
  <//>`;
}
