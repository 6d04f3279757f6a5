"""Prompts, demonstrations and verifiers; the demo's inputs."""
