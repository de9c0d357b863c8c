"""What the report shows of each kind of stage: one module for each family of kinds, each with its :class:`View`.

They lie below the rest of the report, which asks them, and above runs, whose records they read. `Stage.view` names
them. Imports no torch.
"""
