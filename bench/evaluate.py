"""Keep an evaluation's results.json, without its texts and with its circumstances, for the table in docs/evaluation.md.

    globenc evaluate validation.jsonl --text-column sentence --label-column label --rationales sst_by_sentence.jsonl \\
        --model minilm-sst2 --output out
    python bench/evaluate.py out && python bench/table.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from harness import circumstances

if __name__ == "__main__":
    results = json.loads((Path(sys.argv[1]) / "results.json").read_text(encoding="utf-8"))
    for name in ("examples", "title", "published"):
        del results[name]
    results["model_name"] = Path(results["model_name"]).name
    results["data"] = [Path(name).name for name in results["data"]]
    results["rationales"] = Path(results["rationales"]).name if results["rationales"] else None
    results["circumstances"] = circumstances()
    path = Path(__file__).parent / "results" / "evaluate.json"
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
