"""What a run was and did, read from its folder: listed, compared, and shown as a page. Needs no torch."""
