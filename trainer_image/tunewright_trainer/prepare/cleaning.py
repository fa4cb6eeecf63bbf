"""The rules that look at one row at a time: it passes, changed or not, or is dropped for a reason."""

from collections import Counter
from typing import Any

from tunewright_crds.dataset import Cleaning, PersonalData
from tunewright_trainer.prepare.conversation import Conversation, Drop
from tunewright_trainer.prepare.refusals import refuses


class Cleaner:
    """Applies the rules of a job."""

    def __init__(self, rules: Cleaning) -> None:
        self.rules = rules
        self.masked: Counter[str] = Counter()

    def clean(self, found: Conversation) -> Conversation | Drop:
        """The conversation as it is to be learned, or why it is dropped."""
        rules = self.rules
        conversation = found.cleaned()
        if sum(map(len, conversation.texts)) > rules.max_characters:
            return Drop("longer than cleaning.maxCharacters")
        if any(_says_less(conversation, at, rules.min_output_characters) for at in conversation.answers):
            return Drop("answer shorter than cleaning.minOutputCharacters")
        if rules.drop_refusals and refuses(conversation):
            return Drop("an answer that declines")
        if rules.personal_data is not PersonalData.KEEP:
            return self._without_personal_data(conversation)
        return conversation

    def _without_personal_data(self, conversation: Conversation) -> Conversation | Drop:
        # The library of phone numbers takes most of a second to load.
        from tunewright_trainer.prepare import personal

        if self.rules.personal_data is PersonalData.MASK:
            return conversation.rewritten(lambda text: personal.masked(text, self.masked))
        kind = next(filter(None, map(personal.first_kind, conversation.every_text())), "")
        return Drop(f"holds personal data ({kind})") if kind else conversation

    def facts(self) -> dict[str, Any]:
        """What the report tells of the rules besides the drops."""
        return {"masked": dict(self.masked.most_common())}


def _says_less(conversation: Conversation, at: int, characters: int) -> bool:
    """Whether an answer is shorter; a call of a tool says enough."""
    message = conversation.messages[at]
    return not message.get("tool_calls") and len(message["content"].strip()) < characters
