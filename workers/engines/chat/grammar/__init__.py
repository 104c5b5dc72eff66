"""Structured output: answers that a JSON Schema, a regular expression or a grammar describes (llguidance)."""
