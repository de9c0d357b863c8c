"""Encoding records as trees, which are kept on disk."""
