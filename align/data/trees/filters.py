"""Filtering preferences that contradict each other, are ties, or are in the held-out data. The whole data set is
examined, and each pair is left out with a reason.

The answers to one prompt are the nodes of a graph, each preference an edge from winner to loser. An edge inside a
strongly connected component of more than one node is part of a circle (A over B over C over A; or A over B and B over
A) and is left out, since ChatGLM-RLHF drops cyclic and tied preferences (https://arxiv.org/abs/2404.00934). Edges that
lead into or out of the circle are kept.

Answers are equal when their texts are, up to white space at the ends and Unicode composition; prompts are compared by
:func:`~align.data.leakage.prompt_digest`.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable

import networkx

from align.data.leakage import prompt_digest
from align.data.records import Messages, Preference, Record
from align.files import digest_json

TIE = "a tie: its margin is 0"
BACKWARDS = "its margin is below 0, so the rejected answer was better"
EQUAL = "chosen and rejected say the same"
CONTRADICTED = "contradicted: another row prefers its rejected answer to its chosen one"
CYCLE = "part of a circle of preferences"
LEAKED = "its prompt is in the held-out data"

_Edge = tuple[bytes, bytes]
"""Digests of the winner and of the loser."""


class PreferenceFilter:
    """Finds the pairs to leave out. :meth:`survey` reads the whole data set first; then :meth:`reasons` is called for
    each record.

    Args:
        held_out: prompt digests of the held-out data, which must not be trained on.
    """

    def __init__(self, held_out: Collection[str] = ()) -> None:
        self._held_out = frozenset(held_out)
        self._conflicts: dict[tuple[str, _Edge], str] = {}
        self.digest = digest_json(sorted(self._held_out))
        """Digest of everything but the records that the results depend on; part of the key of cached data."""

    def survey(self, records: Iterable[Record]) -> None:
        """Search all records for contradictions and circles. Keeps three digests for each pair in memory."""
        edges: dict[str, set[_Edge]] = defaultdict(set)
        for record in records:
            if isinstance(record, Preference):
                # Only pairs that count as preferences are edges
                sure = [_unsure(margin) is None for margin in record.margins or [None] * len(record.rejected)]
                found = {
                    edge for edge, counts in zip(_edges(record), sure, strict=True) if counts and edge[0] != edge[1]
                }
                if found:
                    edges[prompt_digest(record)] |= found
        for prompt, all_of_it in edges.items():
            if len(all_of_it) > 1:
                self._conflicts |= {(prompt, edge): reason for edge, reason in conflicts(all_of_it).items()}

    def reasons(self, record: Preference) -> list[str | None]:
        """For each rejected answer, why its pair is left out; None for a pair that is kept."""
        prompt = prompt_digest(record)
        whole = LEAKED if prompt in self._held_out else None
        unsure = [_unsure(margin) for margin in record.margins or [None] * len(record.rejected)]
        return [
            whole or doubt or (EQUAL if edge[0] == edge[1] else self._conflicts.get((prompt, edge)))
            for edge, doubt in zip(_edges(record), unsure, strict=True)
        ]

    def hint(self, reasons: Collection[str]) -> str | None:
        """Advice for the case that no pair is left, given the reasons."""
        return "hold out other prompts, or set filters: false" if LEAKED in reasons else None


def _unsure(margin: float | None) -> str | None:
    """The reason why a pair with this margin is not a preference; None if it is one."""
    if margin is None or margin > 0:
        return None
    if margin:
        return BACKWARDS
    return TIE


def conflicts(edges: Collection[_Edge]) -> dict[_Edge, str]:
    """The edges of a prompt's graph that are part of a circle, each with its reason."""
    graph = networkx.DiGraph(list(edges))
    component = {
        node: number for number, nodes in enumerate(networkx.strongly_connected_components(graph)) for node in nodes
    }
    together = [edge for edge in edges if component[edge[0]] == component[edge[1]]]
    return {(winner, loser): CONTRADICTED if (loser, winner) in edges else CYCLE for winner, loser in together}


def prompt_digests(records: Iterable[Record]) -> set[str]:
    """Digests of the prompts of a data set, for ``held_out``."""
    return {prompt_digest(record) for record in records}


def _edges(record: Preference) -> list[_Edge]:
    winner = _answer_digest(record.chosen)
    return [(winner, _answer_digest(loser)) for loser in record.rejected]


def _answer_digest(messages: Messages) -> bytes:
    said = [[m["role"], unicodedata.normalize("NFC", m["content"].strip()), m.get("tool_calls")] for m in messages]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).digest()[:16]
