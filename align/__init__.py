"""align: a post-training alignment toolkit. One YAML recipe, many stages, one training loop."""

__version__ = "0.1.0"
