"""Repack a Mixture-of-Experts checkpoint into a container that streams. Imports formats, never runtime."""
