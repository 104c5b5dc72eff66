// Asks for data again and again while somebody can see the page.

import { useCallback, useEffect, useRef, useState } from "../vendor/preact-hooks.js";

const LONGEST_MS = 15000;

/**
 * Call `load(signal)` every `intervalMs` while the tab is visible, and less often while it fails.
 *
 * Returns `data` (the last that arrived, undefined before), `error` (of the last call, null if it succeeded), `at`
 * (when `data` arrived, by performance.now()) and `refresh()`, which calls at once. Another `load` starts again.
 */
export function usePoll(load, intervalMs) {
  const [state, setState] = useState({ data: undefined, error: null, at: 0 });
  const wake = useRef(() => {});

  useEffect(() => {
    const ended = new AbortController();
    let timer = 0;
    let failures = 0;
    let running = false;
    let again = false;

    const run = async () => {
      clearTimeout(timer);
      if (document.hidden || ended.signal.aborted) return;
      if (running) {
        again = true;
        return;
      }
      running = true;
      try {
        const data = await load(ended.signal);
        if (ended.signal.aborted) return;
        failures = 0;
        setState({ data, error: null, at: performance.now() });
      } catch (error) {
        if (ended.signal.aborted) return;
        failures += 1;
        setState((state) => ({ ...state, error }));
      } finally {
        running = false;
      }
      const wait = again ? 0 : Math.min(intervalMs * 2 ** Math.min(failures, 8), LONGEST_MS);
      again = false;
      timer = setTimeout(run, wait);
    };

    wake.current = run;
    run();
    // a tab that was hidden or a machine that slept shows old data until these
    document.addEventListener("visibilitychange", run);
    window.addEventListener("online", run);
    window.addEventListener("pageshow", run);
    return () => {
      ended.abort();
      clearTimeout(timer);
      document.removeEventListener("visibilitychange", run);
      window.removeEventListener("online", run);
      window.removeEventListener("pageshow", run);
    };
  }, [load, intervalMs]);

  return { ...state, refresh: useCallback(() => wake.current(), []) };
}

/** Draw the component again every `intervalMs`, for texts such as "12 s ago". */
export function useTick(intervalMs) {
  const [, setCount] = useState(0);
  useEffect(() => {
    const timer = setInterval(() => document.hidden || setCount((count) => count + 1), intervalMs);
    return () => clearInterval(timer);
  }, [intervalMs]);
}
