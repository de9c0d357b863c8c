"""What the commands of the command line do, one module each: the command line itself only parses and calls."""
