"""Benchmarks of whatever gives answers scores or verdicts: one file for each, with how its official code counts. Reads
no model."""
