"""Code that several kinds of stages share."""
