"""Generating pages of the documentation from the schema."""
