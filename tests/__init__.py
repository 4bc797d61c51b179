"""The tests: their folders are sub-packages, so that tests/runtime is never taken for the package runtime."""
