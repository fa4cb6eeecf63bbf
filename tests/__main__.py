"""``make test``: runs every test and ends with pytest's one summary line.

Two processes share the tests, a file at a time: the whole cluster's tests wait for pods most of the time, so the others run beside them.

``FAST=1`` runs the unit tests only. Arguments go to pytest. The clusters stay up for the next run, unless this is CI's.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHARED = ("-n", "2", "--no-loadscope-reorder")
CLUSTERS = ("test", "control", "self-test")


def main() -> int:
    arguments = sys.argv[1:]
    # Thread pools as large as the machine make tiny models slower, and sums depend on the number of threads.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    if os.environ.get("FAST") == "1":
        arguments = arguments or ["tests/unit"]
    try:
        return subprocess.run([sys.executable, "-m", "pytest", *SHARED, *arguments], cwd=ROOT, env=environment, check=False).returncode
    finally:
        if os.environ.get("CI"):
            for name in CLUSTERS:
                subprocess.run([sys.executable, "-m", "tests.cluster", "down", "--name", name], cwd=ROOT, check=False, timeout=120)


if __name__ == "__main__":
    sys.exit(main())
