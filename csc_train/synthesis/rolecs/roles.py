"""The roles' prompts, from `prompts/<language>/<role>.jinja`, and the pydantic schemas of their answers.

A prompt file consists of blocks (task, scenario, rules, history, turn, answer); a layout orders the blocks.
"""

import functools
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field, create_model

from csc_train.data.dialogue import Turn, has_surrogate
from csc_train.data.strategies import STRATEGIES, Strategy, parse_strategy
from csc_train.files import digest
from csc_train.synthesis.rolecs.engine import DIALOGUE_ROLES, RoleQuestion
from csc_train.synthesis.utterances import Utterance, as_text
from csc_train.templates import load_template, read_text

WRITING_ROLES = ("persona", *DIALOGUE_ROLES)
"""The roles that write: the persona writer and the five roles of the engine."""
LAYOUT_BLOCKS = {
    "faithful": ((), ("task", "scenario", "history", "turn", "rules", "answer")),
    "cache_friendly": (("task", "rules", "answer", "scenario"), ("history", "turn")),
}
"""Blocks of the system message and of the user message, by layout. faithful: one message, fields in the paper's order.
cache_friendly: constant blocks precede the history, so that a server's prefix cache covers all but the newest
utterances."""

_STRATEGY_LABEL = {"zh": "（{}）", "en": " ({})"}
_LABEL = re.compile(r"[\[【(（]([^\]】)）]{1,40})[\]】)）][:：\s]*")


def _clean_text(text: str, longest: int | None = None, spoken: bool = False) -> str:
    """A text on one line; a `spoken` one without a leading strategy label, which the customer must not see.

    One line, because prompts show one utterance per line, and a second line could imitate another speaker.

    Raises:
        ValueError: the text is empty, longer than `longest` characters, or holds a lone surrogate.
    """
    text = " ".join(text.split())
    while spoken and (match := _LABEL.match(text)):
        try:
            parse_strategy(match.group(1))
        except ValueError:
            break
        text = text[match.end() :]
    if not text:
        raise ValueError("the text is empty")
    if longest is not None and len(text) > longest:
        raise ValueError(f"the text has {len(text)} characters, at most {longest} are allowed")
    if has_surrogate(text):
        raise ValueError("the text holds a lone surrogate")
    return text


@functools.cache
def answer_schema(role: str, language: str, compact: bool, exhausted: Strategy | None = None) -> type[BaseModel]:
    """The schema of a role's answer; lengths are in characters.

    The strategy is an enumeration of the names in `language` except `exhausted`, for servers that enforce the schema.
    Answers of other servers are checked by the engine, which has a rule for unknown labels.
    """

    def text(longest: int, short: int, spoken: bool = False) -> Any:
        short *= 1 if language == "zh" else 3
        check = functools.partial(_clean_text, longest=short if compact else longest, spoken=spoken)
        # For small models only: not every server supports lengths in a schema.
        hint = [Field(json_schema_extra={"minLength": 1, "maxLength": short})] if compact else []
        return Annotated[str, AfterValidator(check), *hint]

    names = [strategy.name(language) for strategy in STRATEGIES if strategy is not exhausted]
    fields = {
        "persona": {"description": text(1000, 60)},
        "planner": {"scenario": text(800, 60), "goal": text(300, 30)},
        "supporter_assistant": {"strategy": Annotated[str, Field(json_schema_extra={"enum": names})]},
        "supporter": {"text": text(400, 40, spoken=True)},
        "customer_assistant": {"direction": text(300, 30)},
        "customer": {"text": text(400, 40, spoken=True), "finished": bool},
    }[role]
    name = f"{role.title().replace('_', '')}Answer"
    required: dict[str, Any] = {field: (kind, ...) for field, kind in fields.items()}
    return create_model(name, **required)


class RolePrompts:
    """The prompts of all roles.

    Attributes:
        language: language of prompts and dialogues, "zh" or "en".
        compact: short prompts and answers, for small models.
    """

    def __init__(self, language: str, layout: str, compact: bool):
        self.language = language
        self.compact = compact
        self._blocks = LAYOUT_BLOCKS[layout]
        self._shared = {"strategies": STRATEGIES, "compact": compact}
        self._layout = layout

    def messages(self, question: RoleQuestion) -> list[dict[str, str]]:
        """The chat messages of a question.

        Raises:
            jinja2.UndefinedError: a variable of the prompt is not in the question.
        """
        template = load_template("csc_train.synthesis", f"prompts/{self.language}/{question.role}.jinja")
        fields = self._shared | question.fields
        if "history" in fields:
            fields["history"] = self._history(fields["history"])
        context = template.new_context(fields)
        texts = [
            "\n\n".join(
                "".join(template.blocks[block](context)).strip() for block in blocks if block in template.blocks
            )
            for blocks in self._blocks
        ]
        return [{"role": role, "content": text} for role, text in zip(("system", "user"), texts, strict=True) if text]

    def _history(self, turns: tuple[Turn, ...]) -> str:
        """The turns, one line each; with the strategy, if the role may see it."""
        names = [turn.strategy.name(self.language) if turn.strategy else "" for turn in turns]
        said = [Utterance(turn.speaker, turn.text, name) for turn, name in zip(turns, names, strict=True)]
        return as_text(said, self.language, _STRATEGY_LABEL[self.language])

    def schema(self, question: RoleQuestion) -> type[BaseModel]:
        """The schema of the answer to a question."""
        return answer_schema(question.role, self.language, self.compact, question.fields.get("exhausted"))

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of all prompt texts, the strategies, the layout and `compact`."""
        names = (*WRITING_ROLES, "history", "behaviour", "rolecs_check")
        files = [read_text("csc_train.synthesis", f"prompts/{self.language}/{name}.jinja") for name in names]
        definitions = [[strategy.name(self.language), strategy.definition(self.language)] for strategy in STRATEGIES]
        return digest([files, definitions, self._layout, self.compact])
