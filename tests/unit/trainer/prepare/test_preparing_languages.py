"""Answers in other languages than the job wants are dropped, and what nobody can tell stays."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from tests.support.preparing import a_data_job, examples, out, prepare_here, report, write_lines
from tunewright_crds.dataset import LANGUAGES

ANSWERS = {
    "Photosynthesis turns the energy of light into chemical energy, which plants store as sugar.": "en",
    "Die Photosynthese wandelt Lichtenergie in chemische Energie um, die Pflanzen als Zucker speichern.": "de",
    "La photosynthèse transforme l'énergie de la lumière en énergie chimique, que les plantes stockent.": "fr",
    "Фотосинтез превращает энергию света в химическую энергию, которую растения запасают.": "ru",
    "Paris": "unsure",
    "for i in range(10):\n    print(i)": "unsure",
}


def test_answers_in_other_languages_are_dropped(tmp_path: Path) -> None:
    data = [{"prompt": "Erkläre in irgendeiner Sprache, was das ist.", "completion": answer} for answer in ANSWERS]
    job = a_data_job(write_lines(tmp_path / "data.jsonl", data), dataset={"cleaning": {"languages": ["en", "fr"]}})
    prepare_here(job, tmp_path)
    told = report(tmp_path)
    assert told["languages"] == {"en": 1, "de": 1, "fr": 1, "ru": 1, "unsure": 2}
    assert told["droppedAt"] == {
        "an answer in another language (de)": ["data.jsonl:2"],
        "an answer in another language (ru)": ["data.jsonl:4"],
    }
    assert len(examples(tmp_path)) == 4
    assert "2 × unsure" in out(tmp_path).get_bytes("report.html").decode()


def test_texts_without_turns_have_a_language_too(tmp_path: Path) -> None:
    data = [{"text": answer} for answer in ANSWERS]
    prepare_here(a_data_job(write_lines(tmp_path / "data.jsonl", data), dataset={"cleaning": {"languages": ["ru"]}}), tmp_path)
    assert len(examples(tmp_path)) == 3


def test_a_language_that_is_not_told_apart_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="must be one of af, am, an"):
        a_data_job(tmp_path, dataset={"cleaning": {"languages": ["en", "klingon"]}})


def test_the_contract_names_the_languages_of_the_library() -> None:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    assert sorted(code for code in LanguageIdentifier.from_model_file(MODEL_FILE).labels if len(code) == 2) == LANGUAGES
