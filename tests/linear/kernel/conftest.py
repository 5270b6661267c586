"""Fixtures of the kernel tests."""

from tests.support.interpreter import interpreted, poisoned

__all__ = ["interpreted", "poisoned"]
