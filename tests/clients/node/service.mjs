// The service under test, as tests/clients/conftest.py started it, and what several tests ask for.
import { z } from "zod";

export const { SERVICE_URL, LIMITED_URL, SERVICE_KEY, ABSENT_MODEL } = process.env;

// One value fits each schema, so that a model of any kind answers with it.
export const Point = z.object({ colour: z.literal("red"), at: z.literal(7) });
export const BALL = { colour: "red", at: 7 };
export const Numbers = z.object({ a: z.literal(3), b: z.literal(4) });

/** Array.fromAsync, which Node.js 20 lacks. */
export async function collect(iterable) {
  const items = [];
  for await (const item of iterable) items.push(item);
  return items;
}
