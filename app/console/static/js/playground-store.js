// State that outlives the components which show it: it stays while another view is open, and ends with the page.

import { useEffect, useState } from "../vendor/preact-hooks.js";

const NEXT_MS = 60;

/** An object of state. Components that call `useStore` are drawn again when it changes. */
export class Store {
  #listeners = new Set();
  #timer = 0;

  constructor(state) {
    this.state = state;
  }

  /** Change some fields now. */
  set(fields) {
    this.state = { ...this.state, ...fields };
    this.tell();
  }

  /** Tell listeners soon that something inside the state has changed: many changes are told together. */
  touch() {
    this.#timer ||= setTimeout(() => this.tell(), NEXT_MS);
  }

  /** Tell listeners now. */
  tell() {
    clearTimeout(this.#timer);
    this.#timer = 0;
    for (const listener of this.#listeners) listener();
  }

  /** Call `listener()` after each change. Returns a function that ends this. */
  subscribe(listener) {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }
}

/** The state of a store; the component is drawn again when it changes. */
export function useStore(store) {
  const [, setCount] = useState(0);
  useEffect(() => store.subscribe(() => setCount((count) => count + 1)), [store]);
  return store.state;
}
