"""What one process of several does in the tests: an evaluation, perhaps one that is killed.

python tests/evaluation/several.py CONFIG.json [ROWS]    killed by itself when that many rows are added to a file
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from cache2cache.config import EvalConfig
from cache2cache.evaluation import runner, writing
from cache2cache.evaluation.run import run

if __name__ == "__main__":
    left = int(sys.argv[2]) if len(sys.argv) > 2 else None

    def add_rows(path: Path, rows: Any) -> None:
        """In the middle of a line, as a kill would have it."""
        global left
        if left is not None and (left := left - len(rows)) <= 0:
            with path.open("a") as file:
                file.write("".join(map(writing.line_of, rows))[:-20])
            os.kill(os.getpid(), signal.SIGKILL)
        writing.add_rows(path, rows)

    runner.add_rows = add_rows  # type: ignore[assignment]
    run(EvalConfig.model_validate(json.loads(Path(sys.argv[1]).read_text())))
