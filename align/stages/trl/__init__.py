"""``kind: trl``: one of TRL's trainers as a stage."""
