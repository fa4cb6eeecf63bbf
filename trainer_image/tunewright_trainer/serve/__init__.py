"""The built-in engine: one base model, many adapters over it, behind OpenAI's HTTP interface.

serve.run(base="s3://...", namespace="team-a", storage=settings, work=Path("/scratch"))
"""

from pathlib import Path

from tunewright_crds import names
from tunewright_crds.pod import StorageSettings
from tunewright_trainer.lean import import_lean


def run(
    *,
    base: str,
    namespace: str,
    storage: StorageSettings,
    work: Path,
    model_id: str = names.ENGINE_BASE_ID,
    port: int = names.ENGINE_PORT,
    threads: int | None = None,
) -> None:
    """Serve until SIGTERM, then finish the requests in flight and return.

    ``base`` is the address of the base model, or of a whole tuned model with ``model_id`` as its name. Adapters are taken from the folders of
    ``namespace`` in ``storage`` alone. ``threads`` are torch's; without them OMP_NUM_THREADS counts. Raises `Refusal` where the model cannot be had.
    """
    import_lean()
    from tunewright_trainer.serve.server import serve

    serve(base=base, namespace=namespace, storage=storage, work=work, model_id=model_id, port=port, threads=threads)
