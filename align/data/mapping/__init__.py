"""Rows read by a recipe's mapping: what was asked, what was answered, and which answer is better."""
