"""Tiny models, programs and the laws themselves, shared by the tests."""
