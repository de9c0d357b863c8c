"""What the report shows of each kind of stage: one module for each family of kinds, each with its :class:`View`.

`Stage.view` names the view of a kind. Views read the records of :mod:`align.runs`, and the rest of the report imports
them. Imports no torch.
"""
