"""Reading the folder of a run, which may be unfinished or damaged."""
