"""Bad input ends in one clear message, before any training pod exists."""

from typing import Any

import pytest

from tests.support.models import tiny_model
from tests.support.rows import alpaca_rows
from tests.support.stack import CommandFailed
from tests.support.tenant import Tenant, a_job
from tunewright_crds import names
from tunewright_crds.errors import ADVICE, FailureCode

GOOD = b'{"instruction": "Say red.", "input": "", "output": "red"}\n'
LONGEST_NAME = "n" * 63


def lines_with(number: int, bad: bytes, *, count: int = 1300) -> bytes:
    """``count`` different good lines, with ``bad`` at a line (from 1)."""
    rows = [b'{"instruction": "Say %d.", "input": "", "output": "%d"}\n' % (line, line) for line in range(1, count + 1)]
    rows[number - 1] = bad + b"\n"
    return b"".join(rows)


def upload_cases(tenant: Tenant) -> dict[str, tuple[dict[str, Any], str, str, str]]:
    """name of the job → (job, failure code, what the message says, what it blames)."""
    model = tenant.upload_folder("model", tiny_model("llama", chat_template=True))
    data = tenant.upload_rows("rows.jsonl", alpaca_rows(40))
    pickled = f"{tenant.upload('pickled/pytorch_model.bin', b'pickle').rsplit('/', 1)[0]}/"
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        tenant.upload(f"pickled/{name}", (tiny_model("llama", chat_template=True) / name).read_bytes())
    tenant.stack.kubectl.apply(
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": "wrong-keys", "namespace": tenant.namespace},
            "stringData": {
                "AWS_ACCESS_KEY_ID": "NOBODY",
                "AWS_SECRET_ACCESS_KEY": "nothing",
                "AWS_ENDPOINT_URL": tenant.stack.facts.s3.endpoint_in_cluster,
            },
        }
    )
    source = "spec.dataset.sources[0].uri"

    def of(name: str, **parts: Any) -> dict[str, Any]:
        dataset = {"sources": [{"uri": parts.pop("data", data)}], "maxLength": 128} | parts.pop("dataset", {})
        return a_job(name, model=parts.pop("model", model), data=data, dataset=dataset, **parts)

    return {
        "missing-bucket": (of("missing-bucket", data="s3://no-such-bucket/rows.jsonl"), "DataNotFound", "no-such-bucket", source),
        "missing-key": (of("missing-key", data=data.replace("rows", "none")), "DataNotFound", "none.jsonl", source),
        "wrong-keys": (of("wrong-keys", dataset={"credentialsSecret": "wrong-keys"}), "AccessDenied", "", source),
        "empty-file": (of("empty-file", data=tenant.upload("empty.jsonl", b"")), "DataEmpty", "empty.jsonl", source),
        "no-output": (
            of("no-output", data=tenant.upload("output.jsonl", lines_with(1234, b'{"instruction": "Say x.", "input": ""}'))),
            "DataInvalid",
            "output.jsonl:1234: output",
            source,
        ),
        "bad-json": (
            of("bad-json", data=tenant.upload("json.jsonl", lines_with(77, b'{"instruction": '))),
            "DataInvalid",
            "json.jsonl:77:",
            source,
        ),
        "pickled": (of("pickled", model=pickled), "ModelUnsafe", "safetensors", "spec.model.uri"),
        "no-model": (of("no-model", model=model.replace("/model/", "/nothing/")), "ModelNotFound", "nothing", "spec.model.uri"),
        "deadline": (of("deadline", activeDeadlineSeconds=1), "DeadlineExceeded", "1 s", "spec.activeDeadlineSeconds"),
    }


def test_each_mistake_is_told_once_and_clearly_and_no_training_pod_is_made(tenant: Tenant) -> None:
    cases = upload_cases(tenant)
    for job, *_ in cases.values():
        tenant.apply(job)
    for name, (_, code, said, blamed) in cases.items():
        status = tenant.wait_phase(name, "Failed")
        error = status["error"]
        assert (error["code"], error["param"]) == (code, blamed), error
        assert said in error["message"], error
        assert error["advice"] == ADVICE[FailureCode(code)]
        assert tenant.pods(name, names.Role.TRAIN) == []
        assert "attempts" not in status or not status["attempts"]


def test_what_is_unusual_but_right_works(tenant: Tenant) -> None:
    """A name of 63 characters, and a tokenizer without a chat template, which gets our default."""
    model = tenant.upload_folder("plain", tiny_model("llama", chat_template=False))
    tenant.apply(
        a_job(
            LONGEST_NAME, model=model, data=tenant.upload("rows.jsonl", b"".join([GOOD.replace(b"red", b"red %d" % n) for n in range(40)]))
        )
    )
    status = tenant.wait_phase(LONGEST_NAME, "Succeeded")
    assert status["model"]["name"] == LONGEST_NAME


REFUSED = {
    "a negative learning rate": ({"hyperparameters": {"learningRate": -1}}, "learningRate"),
    "an unknown field": ({"hyperparameters": {"learningrate": 1e-4}}, "learningrate"),
}


@pytest.mark.parametrize(("part", "said"), REFUSED.values(), ids=REFUSED)
def test_what_the_definition_rules_out_is_refused_on_apply(tenant: Tenant, part: dict[str, Any], said: str) -> None:
    with pytest.raises(CommandFailed, match=said):
        tenant.apply(a_job("refused", model="s3://uploads/model/", data="s3://uploads/rows.jsonl", **part))
    assert tenant.stack.kubectl.find("itj", "refused", "-n", tenant.namespace) is None
