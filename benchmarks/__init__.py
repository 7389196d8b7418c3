"""Measurements, apart from the tests: a test never asserts a time."""
