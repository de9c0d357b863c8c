"""One check of everything that needs a GPU: ``python -m benchmarks gpu [PART ...] [--out FILE]``, or ``make gpu``.

It is made of parts. Each runs in a process of its own with a time limit, and is written to the results as it ends, so
the same command goes on where an earlier one was ended. A part that needs what is not installed is skipped, and says
what it needs. ``docs/gpu.md`` is made from the results by ``python -m benchmarks docs``.

``--device cpu --tiny`` runs all parts with tiny shapes on the CPU: to see that the script itself works.

- parts.py    the parts, their processes, their limits, and the file of results
- steps.py    our trainers on random weights: the work, the steps, and what is measured of them
- peers.py    TRL's trainers on the same work; vLLM beside a trainer; the tests that need a GPU
- counts.py   operations of a step, peaks of known devices, kinds of kernels
- page.py     docs/gpu.md
"""
