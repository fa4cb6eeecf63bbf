"""The rules that look at one row at a time: it passes, changed or not, or is dropped for a reason."""

from collections import Counter
from collections.abc import Iterable
from copy import copy
from typing import Any

from tunewright_crds.dataset import Cleaning, PersonalData, Split
from tunewright_trainer.prepare.contamination import HeldOut
from tunewright_trainer.prepare.conversation import Conversation, Drop
from tunewright_trainer.prepare.languages import UNSURE, Languages
from tunewright_trainer.prepare.refusals import refuses


class Cleaner:
    """Applies the rules of a job."""

    def __init__(self, rules: Cleaning) -> None:
        self.rules = rules
        self.masked: Counter[str] = Counter()
        self.languages: Counter[str] = Counter()
        self._languages = Languages() if rules.languages else None
        self._held_out = HeldOut(rules.decontaminate.words) if rules.decontaminate.enabled else None

    def aside(self) -> "Cleaner":
        """One that holds out for this one, and counts for itself."""
        other = copy(self)
        other.masked, other.languages = Counter(), Counter()
        return other

    def hold_out(self, rows: Iterable[Conversation]) -> None:
        """Drop rows to train on that share a run of words with one of these, if that is a rule."""
        if self._held_out:
            for row in rows:
                self._held_out.add(row.cleaned())

    def clean(self, found: Conversation, split: Split) -> Conversation | Drop:
        """The conversation as it is to be learned, or why it is dropped. Rows that are held out must come first."""
        rules = self.rules
        conversation = found.cleaned()
        if sum(map(len, conversation.texts)) > rules.max_characters:
            return Drop("longer than cleaning.maxCharacters")
        if any(_says_less(conversation, at, rules.min_output_characters) for at in conversation.answers):
            return Drop("answer shorter than cleaning.minOutputCharacters")
        if rules.drop_refusals and refuses(conversation):
            return Drop("an answer that declines")
        if self._languages and (language := self._language(self._languages, conversation)) not in (UNSURE, *rules.languages):
            return Drop(f"an answer in another language ({language})")
        if split is not Split.TRAIN:
            self.hold_out([conversation])
        elif self._held_out and self._held_out.shares(conversation):
            return Drop(f"shares {rules.decontaminate.words} words in a row with a held-out row")
        if rules.personal_data is not PersonalData.KEEP:
            return self._without_personal_data(conversation)
        return conversation

    def _language(self, languages: Languages, conversation: Conversation) -> str:
        answers = [one.messages[at]["content"] for one in conversation.documents for at in one.answers] or [conversation.text]
        language = languages.of("\n".join(answers).strip())
        self.languages[language] += 1
        return language

    def _without_personal_data(self, conversation: Conversation) -> Conversation | Drop:
        # The library of phone numbers takes most of a second to load.
        from tunewright_trainer.prepare import personal

        if self.rules.personal_data is PersonalData.MASK:
            return conversation.rewritten(lambda text: personal.masked(text, self.masked))
        kind = next(filter(None, map(personal.first_kind, conversation.every_text())), "")
        return Drop(f"holds personal data ({kind})") if kind else conversation

    def add(self, facts: dict[str, Any]) -> None:
        """Take in what another one has counted."""
        self.masked.update(facts["masked"])
        self.languages.update(facts["languages"])

    def facts(self) -> dict[str, Any]:
        """What the report tells of the rules besides the drops."""
        return {"masked": dict(self.masked.most_common()), "languages": dict(self.languages.most_common())}


def _says_less(conversation: Conversation, at: int, characters: int) -> bool:
    """Whether an answer is shorter; a call of a tool says enough."""
    message = conversation.messages[at]
    return not message.get("tool_calls") and len(message["content"].strip()) < characters
