"""Benchmarks. They are separate from the tests: a test never asserts a time."""
