// Markdown of models, which is untrusted text, as elements.

import { html } from "./ui.js";
import DOMPurify from "../vendor/dompurify.js";
import MarkdownIt from "../vendor/markdown-it.js";
import { useLayoutEffect, useRef } from "../vendor/preact-hooks.js";

const TAGS = [
  "a", "blockquote", "br", "code", "del", "div", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre",
  "s", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul",
];
const CLEAN = {
  ALLOWED_TAGS: TAGS,
  ALLOWED_ATTR: ["class", "href", "start", "title"],
  ALLOWED_URI_REGEXP: /^(?:https?:|mailto:)/i,
  ALLOW_ARIA_ATTR: false,
  ALLOW_DATA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

// HTML in Markdown is shown as text
const markdown = new MarkdownIt({ html: false, linkify: true });
markdown.linkify.set({ fuzzyLink: false, fuzzyEmail: false });

const { escapeHtml } = markdown.utils;
const { rules } = markdown.renderer;
// an image would be a request to another host, which the policy forbids: it becomes a link
rules.image = (tokens, index) => {
  const token = tokens[index];
  return `<a href="${escapeHtml(token.attrGet("src"))}">${escapeHtml(token.content || "image")}</a>`;
};
// alignment is an inline style, which the policy forbids: it becomes a class
rules.th_open = rules.td_open = (tokens, index, options, env, renderer) => {
  const token = tokens[index];
  const align = /^text-align:(left|center|right)$/.exec(token.attrGet("style") ?? "")?.[1];
  token.attrs = align ? [["class", align]] : null;
  return renderer.renderToken(tokens, index, options);
};
rules.table_open = () => `<div class="wide"><table>`;
rules.table_close = () => "</table></div>";

DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName !== "A") return;
  node.setAttribute("target", "_blank");
  node.setAttribute("rel", "noopener noreferrer nofollow");
});

/** Make a DocumentFragment of HTML in which nothing runs, loads or looks like the page itself. */
export function clean(text) {
  return DOMPurify.sanitize(text, CLEAN);
}

/** Show Markdown in an element. Blocks that stay the same keep their nodes, and with them a selection. */
export function renderMarkdown(element, text) {
  const before = [...element.childNodes];
  const after = [...clean(markdown.render(text)).childNodes];
  let same = 0;
  while (same < before.length && same < after.length && before[same].isEqualNode(after[same])) same += 1;
  for (const node of before.slice(same)) node.remove();
  element.append(...after.slice(same));
}

/** `text` as Markdown. */
export function Markdown({ text }) {
  const element = useRef(null);
  useLayoutEffect(() => renderMarkdown(element.current, text), [text]);
  return html`<div class="markdown" ref=${element}></div>`;
}
