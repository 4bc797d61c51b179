"""What bytes mean: encodings, records, the container's index, checkpoint headers. Imports nothing of ours."""

__version__ = "0.1.0"
