"""Checks the engines on the device that will serve: run once before it does. scripts/gpu-check runs it."""
