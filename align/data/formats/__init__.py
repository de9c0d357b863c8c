"""Which shape the rows of a source have, and from there to records."""
