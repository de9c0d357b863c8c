"""From files and hub data sets to records, and from records to token ids with a loss mask."""
