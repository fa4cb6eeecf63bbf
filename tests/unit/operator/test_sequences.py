"""Whatever happens, in whatever order, and whatever a late watch hides: never two active attempts, and no attempt after the end."""

from collections.abc import Callable

from hypothesis import HealthCheck, example, given, note
from hypothesis import settings as tries
from hypothesis import strategies as st

from tests.support.builders import MEASURED, PREPARED_WITH_TEST, TRAINED, World, a_prepared_world, failure, stopped
from tunewright_crds.errors import FailureCode
from tunewright_crds.names import Role
from tunewright_operator.observed import Batch


def newest(world: World, role: Role) -> str | None:
    """The child of a role that has not ended, if there is one."""
    held = [Batch.of(body) for body in world.batches.values()]
    return next((batch.id.name for batch in held if batch.role == role and not batch.finished and not batch.id.deleting), None)


def to(role: Role, act: Callable[[World, str], object]) -> Callable[[World], object]:
    """Something that happens to the child of a role, where there is one."""

    def happen(world: World) -> object:
        name = newest(world, role)
        return name and act(world, name)

    return happen


def forget(world: World) -> None:
    """The operator starts anew and remembers nothing of what was deleted."""
    world.memories.clear()
    world.pod_memories.clear()


HAPPENINGS: dict[str, Callable[[World], object]] = {
    "prepared": to(Role.PREPARE, lambda w, n: w.finish(n, PREPARED_WITH_TEST)),
    "preparation broke": to(Role.PREPARE, lambda w, n: w.finish(n, failure(FailureCode.STORAGE_UNAVAILABLE), exit_code=69)),
    "runs": to(Role.TRAIN, lambda w, n: w.start(n)),
    "trained": to(Role.TRAIN, lambda w, n: w.finish(n, TRAINED)),
    "measured": to(Role.EVALUATE, lambda w, n: w.finish(n, MEASURED)),
    "measuring broke": to(Role.EVALUATE, lambda w, n: w.finish(n, failure(FailureCode.STORAGE_UNAVAILABLE), exit_code=69)),
    "evaluation deleted": to(Role.EVALUATE, lambda w, n: w.delete_batch(n)),
    "broke": to(Role.TRAIN, lambda w, n: w.finish(n, failure(FailureCode.STORAGE_UNAVAILABLE), exit_code=69)),
    "out of memory": to(Role.TRAIN, lambda w, n: w.finish(n, exit_code=137, reason="OOMKilled")),
    "no image": to(
        Role.TRAIN,
        lambda w, n: w.start(n, phase="Pending", containerStatuses=[{"state": {"waiting": {"reason": "ImagePullBackOff"}}}]).pass_time(700),
    ),
    "pod lost": to(Role.TRAIN, lambda w, n: w.start(n).lose_pod(n)),
    "Job deleted": to(Role.TRAIN, lambda w, n: w.delete_batch(n)),
    "preparation deleted": to(Role.PREPARE, lambda w, n: w.delete_batch(n)),
    "collected": lambda w: w.collect(stopped(resumed=0, reached=5)),
    "suspended": lambda w: w.change(suspend=True),
    "resumed": lambda w: w.change(suspend=False),
    "cancelled": lambda w: w.change(cancel=True),
    "a minute": lambda w: w.pass_time(60),
    "ten minutes": lambda w: w.pass_time(600),
    "restart": forget,
    "nothing": lambda w: None,
}
PASSES: dict[str, Callable[[World], object]] = {
    "a pass": lambda w: w.reconcile(),
    "no pass yet": lambda w: None,
    "a pass of the blind": lambda w: w.reconcile(blind=frozenset(list(w.batches)[-1:])),
    "a crash after one write": lambda w: w.reconcile(upto=1),
    "a crash before any write": lambda w: w.reconcile(upto=0),
}
STEP = st.tuples(st.sampled_from(sorted(HAPPENINGS)), st.sampled_from(["a pass", *sorted(PASSES)]))


@tries(max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@example(True, [("no image", "a pass"), ("ten minutes", "a pass"), ("ten minutes", "a pass")])  # given up, still shutting down
@given(st.booleans(), st.lists(STEP, max_size=30))
def test_never_two_active_attempts(prepared: bool, story: list[tuple[str, str]]) -> None:
    world = a_prepared_world(outcome=PREPARED_WITH_TEST) if prepared else World()
    numbers = [1] if prepared else []
    for happening, look in story:
        note(f"{happening}, then {look}")
        HAPPENINGS[happening](world)
        terminal_before = world.status.phase.terminal
        made_before = set(world.batches)
        PASSES[look](world)
        made = [Batch.of(world.batches[name]) for name in world.batches if name not in made_before]
        numbers += [batch.attempt for batch in made if batch.role == Role.TRAIN]
        assert world.active() <= 1
        assert numbers == sorted(set(numbers)), "an attempt's number is never used twice"
        assert not (terminal_before and made), "a finished job starts nothing"
        assert not any(batch.role == Role.TRAIN for batch in made) or world.status.model is None, "what is trained is not trained again"
        assert not any(batch.role == Role.EVALUATE for batch in made) or world.active() == 0, "nothing is measured while it is trained"
        assert world.model is None or world.status.evaluation or look != "a pass", "no model is registered before it is measured"
        for batch in made:
            arguments = world.batches[batch.id.name]["spec"]["template"]["spec"]["containers"][0]["args"]
            assert batch.role != Role.TRAIN or "d1" in arguments, "no training before the data is prepared"
