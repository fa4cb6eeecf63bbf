"""``make demo``: from nothing to a tuned model that answers, on this machine.

Brings a single-machine Kubernetes up, installs the platform with helm, uploads a tiny base model and its instruction data to object storage, applies
``job.yaml`` with kubectl, shows its progress, and then asks the base and the tuned model the same held-out questions through the front end.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from openai import OpenAI
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tests.support.stack import RELEASE, SYSTEM_NAMESPACE, Stack, installed_stack

HERE = Path(__file__).parent
CLUSTER = "demo"
NAMESPACE = "quickstart"
JOB = "quickstart"
BUCKET = "quickstart"
JOB_SECONDS = 900
SHOWN = 5  # answers printed side by side
LEAST_TUNED = 0.90
MOST_BASE = 0.05
ASKING_AT_ONCE = 4

console = Console()


@contextlib.contextmanager
def step(title: str) -> Iterator[None]:
    """Tells a step and how long it took."""
    console.print(f"[bold]▸ {title}[/bold]")
    began = time.monotonic()
    yield
    console.print(f"  [dim]{time.monotonic() - began:.0f} s[/dim]")


def upload(stack: Stack) -> None:
    """Puts the base model and the instruction data where a user's would lie."""
    stack.make_bucket(BUCKET)
    client = stack.s3()
    for folder in ("model", "data"):
        for path in sorted((HERE / folder).iterdir()):
            client.upload_file(str(path), BUCKET, f"{folder}/{path.name}")


def follow(stack: Stack) -> dict[str, Any]:
    """Shows the job's progress until it ended; returns its status."""
    columns = (TextColumn("  {task.description:<11}"), BarColumn(), TextColumn("{task.fields[told]}"), TimeElapsedColumn())
    end = time.monotonic() + JOB_SECONDS
    phase = ""
    with Progress(*columns, console=console) as shown:
        bar = shown.add_task("Pending", total=100, told="")
        while time.monotonic() < end:
            status: dict[str, Any] = stack.kubectl.get("itj", JOB, "-n", NAMESPACE).get("status", {})
            progress = status.get("progress", {})
            if status.get("phase", "") != phase:
                phase = status["phase"]
                shown.print(f"  {phase}")
            waits = [condition.get("message", "") for condition in status.get("conditions", []) if condition["status"] == "False"]
            told = f"step {progress['step']}/{progress['maxSteps']} · loss {progress.get('loss', '')}" if progress else " ".join(waits)[:80]
            shown.update(bar, description=phase or "Pending", completed=progress.get("percent", 0), told=told)
            if phase in ("Succeeded", "Failed", "Cancelled"):
                return status
            time.sleep(1)
    raise SystemExit(f"The job did not end within {JOB_SECONDS} s; look at: kubectl describe itj {JOB} -n {NAMESPACE}")


def ask(client: OpenAI, model: str, rows: list[dict[str, str]]) -> list[str]:
    """What a model answers to each question, in order."""

    def one(row: dict[str, str]) -> str:
        question = row["instruction"] + (f"\n\n{row['input']}" if row["input"] else "")
        answer = client.chat.completions.create(model=model, messages=[{"role": "user", "content": question}], max_tokens=32, temperature=0)
        return (answer.choices[0].message.content or "").strip()

    with ThreadPoolExecutor(ASKING_AT_ONCE) as pool:
        return list(pool.map(one, rows))


def compare(address: str, token: str) -> tuple[float, float]:
    """Asks base and tuned model the held-out questions, prints some of both, and returns the share of exact matches (base, tuned)."""
    rows: list[dict[str, str]] = [json.loads(line) for line in (HERE / "data" / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    client = OpenAI(base_url=f"{address}/v1", api_key=token, timeout=60, max_retries=3)
    tuned = ask(client, f"{NAMESPACE}/{JOB}", rows)
    base = ask(client, f"{NAMESPACE}/{JOB}:base", rows)
    table = Table("question", "wanted", "base model", "tuned model", title=f"{SHOWN} of {len(rows)} questions that no training row asks")
    for index in range(0, len(rows), max(1, len(rows) // SHOWN)):
        row = rows[index]
        table.add_row(f"{row['instruction']} {row['input']}".strip(), row["output"], base[index][:40], tuned[index][:40])
    console.print(table)
    right = [[answer == row["output"].strip() for answer, row in zip(answers, rows, strict=True)] for answers in (base, tuned)]
    return sum(right[0]) / len(rows), sum(right[1]) / len(rows)


def main() -> int:
    began = time.monotonic()
    with step("a Kubernetes and an S3 server on this machine, the platform's images, the chart"):
        stack = installed_stack(CLUSTER)
    with step("the base model and the instruction data go to object storage"):
        upload(stack)
        stack.make_namespace(NAMESPACE, account="visitor", role="view")
    with step("kubectl apply -f examples/quickstart/job.yaml"):
        stack.kubectl("delete", "itj", JOB, "-n", NAMESPACE, "--ignore-not-found", "--wait=true")
        stack.kubectl("apply", "-n", NAMESPACE, "-f", str(HERE / "job.yaml"))
        status = follow(stack)
        if status["phase"] != "Succeeded":
            console.print(f"[red]{json.dumps(status.get('error', {}), indent=2)}[/red]")
            return 1
        console.print(stack.kubectl("get", "itj", "-n", NAMESPACE))
        measured = Table("metric", "base model", "tuned model", title="measured by the platform on held-out questions")
        for one in status["evaluation"]["metrics"]:
            measured.add_row(one["metric"], f"{one['base']:.4g}", f"{one['tuned']:.4g}")
        console.print(measured)
    with step("the tuned model is loaded into the serving pods"):
        # An earlier demo's version may answer still.
        served = f"--for=jsonpath={{.status.servedVersion}}={status['model']['version']}"
        stack.kubectl("wait", served, f"tunedmodel/{JOB}", "-n", NAMESPACE, "--timeout=180s", timeout=200)
    with step("the same questions to both models, through the OpenAI-compatible front end"), stack.front_end() as address:
        base, tuned = compare(address, stack.kubectl.token("visitor", NAMESPACE))
    console.print(
        f"\nexact match on held-out questions: base [red]{base:.0%}[/red], tuned [green]{tuned:.0%}[/green]  ({time.monotonic() - began:.0f} s in all)\n"
    )
    remove = f"kubectl delete namespace {NAMESPACE} && helm uninstall {RELEASE} -n {SYSTEM_NAMESPACE}"
    console.print(
        f"""Look around:
  export KUBECONFIG={os.path.relpath(stack.facts.kubeconfig)} PATH=.tunewright/bin:$PATH
  kubectl get itj,tm -n {NAMESPACE}
The web page, with a token to sign in with:
  kubectl port-forward -n {SYSTEM_NAMESPACE} service/{RELEASE}-api 8080:80    then open http://127.0.0.1:8080
  kubectl create token visitor -n {NAMESPACE}
Stop and remove everything:
  {remove if stack.facts.external else f"python3 -m tests.cluster down --name {CLUSTER}"}""",
        highlight=False,
    )
    if tuned < LEAST_TUNED or base >= MOST_BASE:
        console.print(f"[red]expected at least {LEAST_TUNED:.0%} tuned and below {MOST_BASE:.0%} base[/red]")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
