"""The measures of an evaluation, and comparing numbers of several policies. Needs no models: answers are texts here."""
