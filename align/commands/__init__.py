"""The work of the commands, one module for each; :mod:`align.cli` only parses arguments and calls them."""
