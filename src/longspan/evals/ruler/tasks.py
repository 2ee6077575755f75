"""RULER's 13 tasks by name, with the configurations of its `scripts/synthetic.yaml`."""

from __future__ import annotations

from longspan.evals.questions.example import Eval, Family
from longspan.evals.ruler.common import Common
from longspan.evals.ruler.documents import Documents
from longspan.evals.ruler.frequent import Frequent
from longspan.evals.ruler.niah import Niah
from longspan.evals.ruler.tracking import Tracking

TASKS: dict[str, Family] = {
    "niah_single_1": Niah("noise"),
    "niah_single_2": Niah("essay"),
    "niah_single_3": Niah("essay", values="uuids"),
    "niah_multikey_1": Niah("essay", needle_keys=4),
    "niah_multikey_2": Niah("needle"),
    "niah_multikey_3": Niah("needle", keys="uuids", values="uuids"),
    "niah_multivalue": Niah("essay", key_values=4),
    "niah_multiquery": Niah("essay", queries=4),
    "vt": Tracking(chains=1, hops=4),
    "cwe": Common(common=10, often=30, seldom=3),
    "fwe": Frequent(alpha=2.0),
    "qa_1": Documents(),
    "qa_2": Documents(hops=True),
}

RULER = Eval(
    "ruler",
    "13 tasks that ask more of a long context than finding one sentence",
    "arXiv 2404.06654",
    version=1,
    tasks=TASKS,
    ordered=frozenset(TASKS) - {"cwe", "fwe"},
)
