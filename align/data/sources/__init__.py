"""Reading the records of one or several sources: filtered, counted, and drawn in proportion to their weights."""
