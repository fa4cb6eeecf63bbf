"""Settings of torch under which equal input gives equal bits."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tunewright_crds.job import JobSpec
from tunewright_trainer.process import thread_count


@contextmanager
def reproducible(spec: JobSpec) -> Iterator[None]:
    """Such settings, put back afterwards.

    The number of threads is part of the arithmetic (it splits sums), so it comes from the job and never from the machine. The processes of a pod share its processors.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what makes cuBLAS deterministic
    threads, mode = torch.get_num_threads(), torch.get_deterministic_debug_mode()
    torch.set_num_threads(max(1, thread_count(spec.resources.cpu) // spec.resources.processes_per_node))
    torch.set_deterministic_debug_mode("warn" if spec.resources.gpus_per_node else "error")
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_deterministic_debug_mode(mode)
