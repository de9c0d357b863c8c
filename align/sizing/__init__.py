"""How much memory, disk and time models and batches need, counted from shapes. Imports no torch."""
