"""Scorers, which say by a number how good an answer is."""
