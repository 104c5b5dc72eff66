// The page: its head, its two views, and what is shown instead while the service asks for a key.

import { hasKey, Refused, sendForJson, setKey } from "./api.js";
import { Console } from "./console.js";
import { KeyForm } from "./key.js";
import { Playground } from "./playground.js";
import { html } from "./ui.js";
import { render } from "../vendor/preact.js";
import { useCallback, useEffect, useState } from "../vendor/preact-hooks.js";

const VIEWS = [
  { hash: "#/", name: "Console", view: Console },
  { hash: "#/playground", name: "Playground", view: Playground },
];

function useHash() {
  const [hash, setHash] = useState(location.hash);
  useEffect(() => {
    const update = () => setHash(location.hash);
    window.addEventListener("hashchange", update);
    return () => window.removeEventListener("hashchange", update);
  }, []);
  return hash;
}

/** Whether the service wants a key that this tab lacks: "asking", "locked" or "open". */
function useAccess() {
  const [access, setAccess] = useState("asking");
  const check = useCallback(async () => {
    try {
      await sendForJson("v1/workers");
      setAccess("open");
    } catch (error) {
      // the views show every other error, and ask again
      setAccess(error instanceof Refused && error.status === 401 ? "locked" : "open");
    }
  }, []);
  useEffect(() => void check(), []);
  return [access, setAccess];
}

function Page({ version }) {
  const hash = useHash();
  const [access, setAccess] = useAccess();
  const current = VIEWS.find((view) => view.hash === hash) ?? VIEWS[0];
  const lock = useCallback(() => {
    setKey("");
    setAccess("locked");
  }, []);
  useEffect(() => {
    document.title = `${current.name} · Model service`;
  }, [current]);

  return html`
    <header class="page-head">
      <a class="skip" href="#main" onClick=${skip}>Skip to the content</a>
      <span class="brand"><img src="static/icon.svg" alt="" width="20" height="20" />Model service</span>
      <nav aria-label="Views">
        ${VIEWS.map((view) => html`<a href=${view.hash} aria-current=${view === current ? "page" : undefined}>
          ${view.name}</a>`)}
      </nav>
      <span class="version" title="Version of the service">${version}</span>
      ${access === "open" && hasKey() && html`<button type="button" class="quiet" onClick=${forget}>Forget key</button>`}
    </header>
    ${access === "locked" && html`<main id="main"><${KeyForm} onAccepted=${() => setAccess("open")} /></main>`}
    ${access === "open" && html`<${current.view} onLocked=${lock} />`}`;
}

/** Forget the key, and with it all that the page holds: conversations, drafts, images, what the workers told. */
function forget() {
  setKey("");
  location.reload();
}

/** Move the focus instead of the address, whose hash names the view. */
function skip(event) {
  event.preventDefault();
  const main = document.getElementById("main");
  if (!main) return;
  main.tabIndex = -1;
  main.focus();
}

const root = document.getElementById("app");
root.replaceChildren();
render(html`<${Page} version=${root.dataset.version} />`, root);
