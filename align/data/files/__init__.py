"""From files and hub data sets to rows, each with the place it stands at."""
