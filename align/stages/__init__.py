"""One module a stage kind: a function from input artefacts to an output artefact."""
