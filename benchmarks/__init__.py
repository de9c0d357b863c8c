"""Speed and memory, measured: ours against peers on the same work, in one run, on one machine.

    python -m benchmarks [NAME ...] [--quick] [--repeats N] [--only CONTENDER ...]
    python -m benchmarks gpu [PART ...] [--out FILE]
    python -m benchmarks docs

- harness.py   what a benchmark is; every measurement in a process of its own; alternation; the JSON that is kept
- measure.py   the clock, peak memory, machine and versions
- report.py    medians and ratios as tables, and docs/benchmarks.md from the JSON
- data.py      real rows and random tokens, as trees
- model.py     the model that everybody trains, and the optimiser's settings that everybody gets
- ours.py, peer.py, bare.py    how our trainers, TRL's, and a bare loop are run and timed
- sft.py, reward.py, dpo.py    the benchmarks
- gpu/         one check of everything that needs a GPU
- curves.py    no measurement: training curves to the last bit, to show that a change of the code changes no number
"""
