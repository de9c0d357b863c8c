"""Reading rows from files and hub data sets, each with its place."""
