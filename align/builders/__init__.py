"""Pair builders that look inside a response: pure functions of samples, scores and settings."""
