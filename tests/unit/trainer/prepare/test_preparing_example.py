"""examples/mixture and examples/preferences do what their comments say, as their first lines have them run."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[4]


def test_the_mixture_is_prepared_as_its_manifest_says(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tunewright_trainer", "prepare", "examples/mixture/job.yaml", "--output", str(tmp_path)]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert told.returncode == 0, told.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert [(source["rows"], source["invalid"]) for source in report["sources"]] == [(48, 0), (1, 0), (8, 0)]
    assert report["droppedAt"] == {"an answer that declines": ["chats.jsonl:7"], "nearly the same as an earlier row": ["chats.jsonl:8"]}
    data = report["dataset"]
    assert data["trainExamples"] + data["validationExamples"] + data["testExamples"] == 48 + 8 + 6
    assert min(data["validationExamples"], data["testExamples"]) >= 6
    assert len(report["samples"]) == 3, "one of each source"
    assert any("unknown to the model's tokenizer" in warning["what"] for warning in report["warnings"]), "it knows no word of these reviews"
    assert data["licenses"] == ["cc0-1.0"]
    assert "What is learned" in (tmp_path / "report.html").read_text()


def test_the_preferences_are_learned_as_their_manifest_says(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tunewright_trainer", "run", "examples/preferences/job.yaml", "--output", str(tmp_path)]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert told.returncode == 0, told.stderr
    (report,) = (json.loads(path.read_text()) for path in tmp_path.rglob("report.json"))
    data = report["dataset"]
    assert [(source["rows"], source["invalid"]) for source in report["sources"]] == [(24, 0), (3, 0)]
    assert data["trainExamples"] + data["validationExamples"] == 24 + 3 * (3 + 1)
    assert report["dropped"] == {}
    (history,) = ([json.loads(line) for line in path.read_text().splitlines()] for path in tmp_path.rglob("train-1.jsonl"))
    evaluated = [line["eval_loss"] for line in history if "eval_loss" in line]
    assert evaluated[-1] < evaluated[0]
    assert list(tmp_path.rglob("adapter_model.safetensors"))
