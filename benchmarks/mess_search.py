"""The exhaustive search on MESS's space: 6 sites x 64 heads, both thresholds, 500 images x 12 classes, proven or not.

    OMP_NUM_THREADS=2 python benchmarks/mess_search.py

Synthetic tables (tests/choose/mess_tables.py) of several kinds, so that a proof is no artefact of an easy one; smaller
spaces beside the whole one say how far a proof reaches. Wall times on two threads; run it on a quiet machine.
"""

import resource
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import offramp
from choose.mess_tables import mess_table
from claims import Sheet

LIMIT_S = 60.0
LADDER: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    ("4 sites x 4 heads, 6 x 6 thresholds, 100 images", {"samples": 100, "sites": 4, "heads": 4},
     {"steps": 6, "pixel_steps": 6}),
    ("6 sites x 8 heads, 10 x 10 thresholds, 100 images", {"samples": 100, "heads": 8},
     {"steps": 10, "pixel_steps": 10}),
    ("6 sites x 64 heads, 20 x 20 thresholds, 500 images, <= 2 exits", {}, {"max_exits": 2}),
    ("6 sites x 64 heads, 20 x 20 thresholds, 500 images, <= 3 exits", {}, {"max_exits": 3}),
    ("the same, heads and images twice as unlike", {"noise": 2.0, "seed": 1}, {"max_exits": 3}),
)


def main() -> None:
    sheet = Sheet("mess_search")
    for words, shape, options in LADDER:
        table = mess_table(**{"skill": 0.35, **shape})
        plan = offramp.search(table, max_drop=0.01, tolerance="exact", time_limit_s=LIMIT_S, **options)
        told = plan.certificate
        saved = plan.predicted["backbone_macs"] / plan.predicted["macs"]
        print(f"{words}: {told['configurations']:.3g} configurations, {told['evaluated']} evaluated, pruned "
              f"{told['pruned']}, {saved:.2f} x fewer MACs", flush=True)
        sheet.add(f"{words}: gap", told["gap"], unit="share", bar="<= 0")
        sheet.add(f"{words}: time", told["seconds"], unit="s", bar="<= 60")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    sheet.add("peak memory, tables included", peak, unit="GiB", bar="<= 4", paper=None)


if __name__ == "__main__":
    main()
