"""Artefacts with manifests, and the runner that executes a recipe's stages once."""
