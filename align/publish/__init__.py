"""A finished model for others: its card, and the way to the hub."""
