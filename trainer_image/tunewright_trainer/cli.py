"""The command line. What is heavy is imported by the verb that needs it, so that help comes at once."""

import logging
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunewright_crds import names
from tunewright_crds.dataset import DatasetStatus
from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.evaluation import EvaluationStatus
from tunewright_crds.hyperparameters import Optimizer
from tunewright_crds.method import Tuner
from tunewright_crds.pod import Outcome, PodConfig
from tunewright_trainer import launch
from tunewright_trainer.process import do_without, ending, work_under_way

if TYPE_CHECKING:
    from tunewright_trainer.storage import Store

app = typer.Typer(name="tunewright-trainer", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
log = logging.getLogger(__name__)

Config = Annotated[Path, typer.Option(help="The job's resolved config, as the operator mounts it.")]
Manifest = Annotated[
    Path, typer.Argument(help="An InstructionTuningJob; addresses in it may be paths of this machine.", show_default=False)
]
Processes = Annotated[int | None, typer.Option(min=1, max=64, help="Processes that train together on this machine; default: one a GPU.")]
Output = Annotated[Path, typer.Option(help="Folder for everything that is made.", show_default=False)]


@app.command()
def prepare(
    manifest: Annotated[Path | None, typer.Argument(help="An InstructionTuningJob, to prepare its data on this machine.")] = None,
    config: Annotated[Path | None, typer.Option(help="In a pod: the job's resolved config.")] = None,
    output: Annotated[Path | None, typer.Option(help="With a manifest: the folder to write to.")] = None,
    shard: Annotated[bool, typer.Option("--shard", help="In a pod of an Indexed Job: read only this pod's share of the files.")] = False,
) -> None:
    """Check, clean, tokenise and pack a job's data. In a pod by --config; on one machine with a manifest and --output."""
    work_under_way.set()
    with ending("prepare", quote_errors=False) as end:
        do_without("torch")  # a tokenizer needs none
        if config is not None and manifest is None and output is None:
            end.outcome = _prepare_in_pod(config, shard=completion_index() if shard else None)
        elif manifest is not None and output is not None and config is None and not shard:
            end.outcome = _prepare_here(manifest, output)
        else:
            raise Refusal(FailureCode.CONFIG_INVALID, "give either --config FILE, or a manifest and --output DIR")


def completion_index() -> int:
    """The number that Kubernetes gives a pod of an Indexed Job."""
    index = os.environ.get("JOB_COMPLETION_INDEX", "")
    if not index.isdecimal():
        raise Refusal(FailureCode.CONFIG_INVALID, "--shard is for pods of an Indexed Job, which are given JOB_COMPLETION_INDEX")
    return int(index)


def _prepare_in_pod(path: Path, *, shard: int | None) -> Outcome:
    from tunewright_trainer import prepare as preparing
    from tunewright_trainer.config import load_pod_config
    from tunewright_trainer.storage import open_store

    config = load_pod_config(path)
    work, store = Path(names.SCRATCH), open_store(config.storage)
    return preparing.run(config, work=work, store=store) if shard is None else preparing.run_shard(config, shard, work=work, store=store)


def _prepare_here(manifest: Path, output: Path) -> Outcome:
    from tunewright_trainer import prepare as preparing
    from tunewright_trainer.config import load_manifest
    from tunewright_trainer.storage import LocalStore

    config = load_manifest(manifest)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="tunewright-") as work:
        outcome = preparing.run(config, work=Path(work), store=LocalStore(output), key="")
    _tell_data(outcome, output)
    return outcome


@app.command()
def discard(
    dataset: Annotated[str, typer.Option(help="Digest of the prepared data.")],
    config: Config = Path(names.CONFIG_FILE),
) -> None:
    """Remove prepared data from the platform's storage. Nobody may be training on it."""
    with ending("discard"):
        do_without("torch")
        from tunewright_crds.storage import dataset_key
        from tunewright_trainer.config import load_pod_config
        from tunewright_trainer.storage import discard_folder, open_store

        if not dataset.isalnum():  # an empty one would mean all data of the namespace
            raise Refusal(FailureCode.CONFIG_INVALID, f"{dataset!r} is not the digest of prepared data", param="--dataset")
        job = load_pod_config(config)
        store, key = open_store(job.storage), dataset_key(job.job.namespace, dataset)
        discard_folder(store, key)
        log.info("removed %s", store.uri(key))


@app.command()
def train(
    attempt: Annotated[int, typer.Option(min=1, help="Number of the attempt.")],
    dataset: Annotated[str, typer.Option(help="Digest of the prepared data.")],
    config: Config = Path(names.CONFIG_FILE),
    halvings: Annotated[int, typer.Option(min=0, help="How often the micro-batch is halved, after running out of memory.")] = 0,
    processes: Processes = None,
) -> None:
    """Train on prepared data, going on from the newest checkpoint, and publish the model."""
    with ending("train") as end:
        from tunewright_trainer.config import load_pod_config

        job = load_pod_config(config)
        node, work = launch.this_node(processes, job.spec.resources.gpus_per_node), launch.scratch()
        if node.size > 1:
            raise SystemExit(launch.run(node, work=work))
        from tunewright_trainer import train as training
        from tunewright_trainer.storage import open_store

        load_no_more_than(job)
        end.outcome = training.run(
            job, attempt=attempt, dataset_digest=dataset, halvings=halvings, work=work, store=open_store(job.storage)
        )


@app.command()
def evaluate(
    dataset: Annotated[str, typer.Option(help="Digest of the prepared data.")],
    model: Annotated[str, typer.Option(help="Address of the published model.")],
    config: Config = Path(names.CONFIG_FILE),
) -> None:
    """Measure a published model on the test rows, beside its base, and judge it by what the job requires."""
    with ending("evaluate", quote_errors=False) as end:
        from tunewright_trainer import evaluate as evaluating
        from tunewright_trainer.config import load_pod_config
        from tunewright_trainer.storage import open_store

        job = load_pod_config(config)
        load_no_more_than(job)
        end.outcome = evaluating.run(job, dataset_digest=dataset, model_uri=model, work=Path(names.SCRATCH), store=open_store(job.storage))


def load_no_more_than(config: PodConfig) -> None:
    """PEFT loads bitsandbytes where it is installed, whether weights are quantised or not; galore-torch cannot do without it."""
    if config.spec.method.tuner is not Tuner.QLORA and config.spec.hyperparameters.optimizer is not Optimizer.GALORE:
        do_without("bitsandbytes")


@app.command()
def serve(
    base: Annotated[str, typer.Option(help="Folder of the model to serve: s3://..., hf://org/name@revision or pvc://claim/path")],
    namespace: Annotated[str, typer.Option(help="Namespace whose adapters may be loaded.")],
    bucket: Annotated[str, typer.Option(help="The platform's bucket.")],
    prefix: Annotated[str, typer.Option(help="Prefix in the bucket.")] = "",
    endpoint: Annotated[str, typer.Option(help="Address of the object storage; empty: AWS.")] = "",
    region: Annotated[str, typer.Option(help="Region of the bucket.")] = "us-east-1",
    model_id: Annotated[str, typer.Option(help="Name under which the model answers; default: that of a base.")] = names.ENGINE_BASE_ID,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = names.ENGINE_PORT,
) -> None:
    """Serve a base model and the adapters that are loaded into it, with OpenAI's API."""
    with ending("serve"):
        do_without("bitsandbytes")
        from tunewright_crds.pod import StorageSettings
        from tunewright_trainer import serve as serving

        storage = StorageSettings(bucket=bucket, prefix=prefix, endpoint=endpoint, region=region)
        serving.run(base=base, namespace=namespace, storage=storage, model_id=model_id, port=port, work=Path(names.SCRATCH))


@app.command(name="plan")
def plan_memory(
    manifest: Manifest,
    gpu_memory: Annotated[int, typer.Option(min=0, help="Memory of the GPU in GiB. Default: not known.")] = 0,
    longest: Annotated[int, typer.Option(min=0, help="Tokens of the longest row. Default: dataset.maxLength.")] = 0,
    learned: Annotated[float, typer.Option(min=0, max=1, help="Share of the tokens that is learned.")] = 1.0,
) -> None:
    """Tell how much memory training will take, without data and without training: from the job and the shapes of its model's weights."""
    with ending("plan"):
        do_without("torch")
        from tunewright_trainer import plan as planning
        from tunewright_trainer.config import load_manifest

        config = load_manifest(manifest).model_copy(update={"gpu_memory": gpu_memory * 2**30})
        rows = {"tokens": 1, "trainable_tokens": learned, "longest_row": longest or config.spec.dataset.max_length}
        status = planning.plan_for(config, {"splits": {"train": rows}})
        typer.echo(planning.table(status))
        planning.refuse(status, config.spec)


@app.command()
def run(manifest: Manifest, output: Output, processes: Processes = None) -> None:
    """Prepare, train, publish and evaluate on this machine, with the manifest that a cluster would be given. Run again, it goes on from its checkpoints."""
    work_under_way.set()
    with ending("run") as end:
        from tunewright_trainer.config import load_manifest

        end.outcome = _run_here(load_manifest(manifest), output, processes)


def _run_here(config: PodConfig, output: Path, processes: int | None) -> Outcome:
    from tunewright_crds.storage import metrics_key
    from tunewright_trainer import prepare as preparing
    from tunewright_trainer import train as training
    from tunewright_trainer.storage import LocalStore

    load_no_more_than(config)
    output.mkdir(parents=True, exist_ok=True)
    store = LocalStore(output)
    with launch.work_folder() as work:
        prepared = preparing.run(config, work=work / f"prepare-{launch.local_rank()}", store=store)
        assert prepared.dataset is not None
        _check_test_rows(config, prepared.dataset)
        if (count := launch.wanted(processes, config.spec.resources.gpus_per_node)) > 1:
            raise SystemExit(launch.run(launch.Node(count), work=work))
        attempt = 1 + sum(1 for _ in store.list(f"{metrics_key(config.job.namespace, config.job.uid)}/"))  # each has a history of its own
        outcome = training.run(config, attempt=attempt, dataset_digest=prepared.dataset.digest, halvings=0, work=work, store=store)
    outcome.dataset = prepared.dataset
    if launch.local_rank() == 0:
        _tell_data(outcome, output)
    if outcome.artifact:
        typer.echo(f"model: {outcome.artifact.uri} ({outcome.artifact.kind})")
        outcome.evaluation = _evaluate_here(config, prepared.dataset, outcome.artifact.uri, store)
    return outcome


def _evaluate_here(config: PodConfig, data: DatasetStatus, model: str, store: "Store") -> EvaluationStatus | None:
    from tunewright_crds.evaluation import left_out
    from tunewright_trainer import evaluate as evaluating

    if why := left_out(config.spec.evaluation, config.spec.method.objective, test_examples=data.test_examples):
        typer.echo(f"evaluation: left out, {why}")
        return None
    with tempfile.TemporaryDirectory(prefix="tunewright-") as work:
        found = evaluating.run(config, dataset_digest=data.digest, model_uri=model, work=Path(work), store=store).evaluation
    for one in found.metrics if found else ():
        typer.echo(f"{one.task}: {one.metric} {one.tuned:.4g}" + (f" (base {one.base:.4g})" if one.base is not None else ""))
    if found:
        typer.echo(f"evaluation: {found.report_uri}")
    return found


def _check_test_rows(config: PodConfig, data: DatasetStatus) -> None:
    from tunewright_crds.evaluation import without_test_rows

    if why := without_test_rows(config.spec.evaluation, test_examples=data.test_examples):
        raise Refusal(FailureCode.CONFIG_INVALID, why, param="spec.evaluation.require")


def _tell_data(outcome: Outcome, output: Path) -> None:
    data = outcome.dataset
    if data:
        typer.echo(f"data: {data.train_examples} train, {data.validation_examples} validation, {data.test_examples} test examples")
        typer.echo(f"report: {data.report_uri or output}")
