"""What an evaluation measures, and how numbers of several policies are compared. Needs no models: answers are text
here."""
