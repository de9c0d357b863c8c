"""Scores: how good is an answer, by whatever judges it."""
