"""Implementations of the operations that models call."""
