// The playground: chats and images, to try the models.

import { Refused, sendForJson } from "./api.js";
import { usePoll } from "./poll.js";
import { Images } from "./playground-gallery.js";
import { Chat } from "./playground-messages.js";
import { Store, useStore } from "./playground-store.js";
import { html, Notice } from "./ui.js";
import { useCallback, useEffect } from "../vendor/preact-hooks.js";

const POLL_MS = 15000;
const shown = new Store({ panel: "chat" });

const PANELS = [
  { id: "chat", name: "Chat", tasks: ["chat"], none: "chats", panel: Chat },
  { id: "images", name: "Images", tasks: ["generation", "edit"], none: "images", panel: Images },
];

/** The view. `onLocked()` is called when the service does not accept the key any more. */
export function Playground({ onLocked }) {
  const { panel } = useStore(shown);
  const load = useCallback(async (signal) => (await sendForJson("v1/models", { signal })).data, []);
  const models = usePoll(load, POLL_MS);
  const locked = models.error instanceof Refused && models.error.status === 401;
  useEffect(() => {
    if (locked) onLocked();
  }, [locked]);

  const current = PANELS.find(({ id }) => id === panel);
  return html`<main id="main" class="playground">
    <h1 class="hidden">Playground</h1>
    <${Tabs} current=${current} />
    <div role="tabpanel" id="panel" aria-labelledby="tab-${current.id}">
      ${models.data
        ? html`<${Panel} current=${current} models=${models.data} />`
        : models.error
          ? html`<${Notice} kind="error">The models are not known: ${models.error.message}. Trying again …<//>`
          : html`<p class="hint">Loading …</p>`}
    </div>
  </main>`;
}

function Panel({ current, models }) {
  const able = models.filter(({ endpoints }) => current.tasks.some((task) => task in endpoints));
  if (able.length === 0) return html`<p class="hint">No model of the catalogue makes ${current.none}.</p>`;
  return html`<${current.panel} models=${able} />`;
}

function Tabs({ current }) {
  const onKeyDown = (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    const place = (PANELS.indexOf(current) + step + PANELS.length) % PANELS.length;
    shown.set({ panel: PANELS[place].id });
    event.currentTarget.children[place].focus();
  };
  return html`<div class="tabs" role="tablist" aria-label="What to try" onKeyDown=${onKeyDown}>
    ${PANELS.map(({ id, name }) => html`<button type="button" role="tab" id="tab-${id}" key=${id} aria-controls="panel"
      aria-selected=${id === current.id} tabindex=${id === current.id ? 0 : -1} onClick=${() => shown.set({ panel: id })}>
      ${name}</button>`)}
  </div>`;
}
