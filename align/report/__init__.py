"""Showing a run from its folder: lists, comparisons, and a report page. Needs no torch."""
