"""Recognising the format of a source's rows, and making records of them."""
