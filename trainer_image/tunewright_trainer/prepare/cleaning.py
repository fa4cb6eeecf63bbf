"""The rules that look at one row at a time: it passes, changed or not, or is dropped for a reason."""

from tunewright_crds.dataset import Cleaning
from tunewright_trainer.prepare.conversation import Conversation, Drop
from tunewright_trainer.prepare.refusals import refuses


class Cleaner:
    """Applies the rules of a job."""

    def __init__(self, rules: Cleaning) -> None:
        self.rules = rules

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
        return conversation


def _says_less(conversation: Conversation, at: int, characters: int) -> bool:
    """Whether an answer is shorter; a call of a tool says enough."""
    message = conversation.messages[at]
    return not message.get("tool_calls") and len(message["content"].strip()) < characters
