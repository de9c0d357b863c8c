"""``python -m benchmarks``: see the package's docstring."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks import contrast, dpo, report, reward, rollout, sft
from benchmarks.gpu import page, parts
from benchmarks.harness import OUT, RESULTS, Benchmark, faults, run, work_once

BENCHMARKS: dict[str, Benchmark] = {
    b.name: b for b in (*sft.BENCHMARKS, *reward.BENCHMARKS, *dpo.BENCHMARKS, *contrast.BENCHMARKS, *rollout.BENCHMARKS)
}
DEFAULT = [b.name for b in (*sft.BENCHMARKS, *dpo.BENCHMARKS, *rollout.BENCHMARKS)]


def main(arguments: list[str]) -> int:
    """Run benchmarks, or write the page. 1 when a contender did other work than ours, or failed."""
    if arguments[:1] == ["worker"]:
        name, contender, index, work, out = arguments[1:]
        work_once(BENCHMARKS[name], contender, int(index), Path(work), Path(out))
        return 0
    if arguments[:1] == ["gpu"]:
        return parts.main(arguments[1:])
    if arguments == ["docs"]:
        report.write_docs()
        page.write_docs()
        return 0
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=f"`docs`, or any of: {', '.join(BENCHMARKS)}"
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: {' '.join(DEFAULT)}")
    parser.add_argument("--quick", action="store_true", help="a few rows, one turn, no settings tried: does it run?")
    parser.add_argument("--repeats", type=int, default=3, help="turns that every contender gets (3)")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="CONTENDER", help="some contenders only; the result is not kept"
    )
    chosen = parser.parse_args(arguments)
    names = chosen.names or DEFAULT
    for unknown in set(names) - set(BENCHMARKS):
        parser.error(f"no benchmark {unknown}; there are {', '.join(BENCHMARKS)}")
    wrong = []
    for name in names:
        benchmark = BENCHMARKS[name]
        result = run(benchmark, quick=chosen.quick, repeats=1 if chosen.quick else chosen.repeats, only=chosen.only)
        folder = OUT if chosen.quick or chosen.only else RESULTS
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        print("\n" + report.section(result))
        wrong += [f"{name}: {fault}" for fault in faults(benchmark, result)]
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
