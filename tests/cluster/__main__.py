"""The command line of the single-machine cluster; README and Makefile call it."""

import argparse
import shlex
import sys

from . import build, images, lifecycle
from .places import BIN, ClusterError, places
from .record import environment, facts
from .services import log_tail


def main() -> int:
    """Run one command; 0 means done, 1 that the message on standard error says what to do."""
    asked = parser().parse_args()
    try:
        return int(asked.run(asked) or 0)
    except ClusterError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python3 -m tests.cluster", description="A real Kubernetes on this one machine.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    named = argparse.ArgumentParser(add_help=False)
    named.add_argument("--name", default="test", help="the cluster; several can run side by side (default: test)")

    commands.add_parser("build", help="install and build the programs").set_defaults(run=lambda _: build.everything(images.provide_base))
    up = commands.add_parser("up", parents=[named], help="bring the cluster up, or repair it")
    up.add_argument("--control-plane-only", action="store_true", help="etcd, API server and S3, without a node: seconds")
    up.add_argument("--controllers", action="store_true", help="the controller manager too")
    up.set_defaults(run=run_up)
    for name, run, text in [
        ("down", run_down, "take it down, also after a crash; logs stay"),
        ("status", run_status, "say how each service does"),
        ("env", run_env, "print export lines for a shell"),
    ]:
        commands.add_parser(name, parents=[named], help=text).set_defaults(run=run)
    for name, run, text in [
        ("stop", run_stop, "stop one service, as a fault"),
        ("start", run_start, "start it again"),
        ("logs", run_logs, "print the end of a service's log"),
    ]:
        command = commands.add_parser(name, parents=[named], help=text)
        command.add_argument("service", nargs="?" if name == "logs" else None)
        command.set_defaults(run=run)
    command = commands.add_parser("images", parents=[named], help="build the project's images and import them")
    command.add_argument("--only", choices=images.NAMES, action="append", help="just this one; may be given again")
    command.set_defaults(run=run_images)
    return top


def run_up(asked: argparse.Namespace) -> None:
    cluster = lifecycle.up(asked.name, control_plane_only=asked.control_plane_only, controllers=asked.controllers)
    print(f"cluster {asked.name!r} works: export KUBECONFIG={cluster.kubeconfig}")


def run_down(asked: argparse.Namespace) -> None:
    lifecycle.down(asked.name)


def run_status(asked: argparse.Namespace) -> int:
    states = lifecycle.status(asked.name)
    for service, state in states.items():
        print(f"{service:20} {state}")
    return 1 if "stopped" in states.values() or "runs" in states.values() else 0


def run_env(asked: argparse.Namespace) -> None:
    for name, value in environment(facts(asked.name)).items():
        print(f"export {name}={shlex.quote(value)}")
    print(f"export PATH={shlex.quote(str(BIN))}:$PATH")


def run_stop(asked: argparse.Namespace) -> None:
    lifecycle.stop_service(asked.name, asked.service)


def run_start(asked: argparse.Namespace) -> None:
    lifecycle.start_service(asked.name, asked.service)


def run_logs(asked: argparse.Namespace) -> None:
    at = places(asked.name)
    written = [asked.service] if asked.service else sorted(log.stem for log in at.logs.glob("*.log"))
    for service in written:
        print(f"==> {service} <==\n{log_tail(service, at)}\n")


def run_images(asked: argparse.Namespace) -> None:
    for image, reference in images.provide(asked.name, asked.only or images.DEFAULT).items():
        print(f"{image:10} {reference}")


if __name__ == "__main__":
    sys.exit(main())
