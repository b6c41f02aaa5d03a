"""Benchmarks: the backbone beside published code, and whole training steps."""
