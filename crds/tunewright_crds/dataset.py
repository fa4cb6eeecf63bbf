"""The instruction data of a job or an InstructionDataset, and how it is prepared."""

from enum import StrEnum
from typing import Annotated, Any, Final

from pydantic import Field, ValidationInfo, field_validator, model_validator

from tunewright_crds.fields import DATA_PINNED, DNS_NAME, PIN_DATA, DataUri, Part, Rules, SecretName, untouched

MAX_SOURCES: Final = 64
MAX_TEMPLATE: Final = 16_384
MAX_SHARDS: Final = 64


class DataFormat(StrEnum):
    AUTO = "auto"
    ALPACA = "alpaca"
    DOLLY = "dolly"
    PROMPT_COMPLETION = "prompt-completion"
    CHAT = "chat"
    SHAREGPT = "sharegpt"
    TEXT = "text"
    P3 = "p3"
    UNIFIEDQA = "unifiedqa"
    UNIFIEDSKG = "unifiedskg"
    NATURAL_INSTRUCTIONS = "natural-instructions"
    SELF_INSTRUCT = "self-instruct"
    OASST = "oasst"
    ULTRACHAT = "ultrachat"
    BAIZE = "baize"
    OIG = "oig"
    COIG = "coig"
    COIG_EXAM = "coig-exam"


class Targets(StrEnum):
    ALL = "all"
    FIRST = "first"


class Split(StrEnum):
    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"


class Overlong(StrEnum):
    TRUNCATE = "truncate"
    DROP = "drop"
    FAIL = "fail"


class TrainOn(StrEnum):
    RESPONSE = "response"
    LAST_RESPONSE = "last-response"
    ALL = "all"


class Source(
    Part,
    json_schema_extra=Rules(
        ("self.template == '' || (self.format == 'auto' && self.columns.size() == 0)", "with a template, format and columns say nothing"),
        (f"!self.uri.startsWith('hf://') || self.uri.matches('{DATA_PINNED}')", PIN_DATA),
        ("self.choices.size() == 0 || self.template != ''", "choices are for a template"),
    ),
):
    """One source of instruction data."""

    uri: DataUri = Field(
        description="A file, a folder of files, or a pattern such as s3://bucket/**/part-*.jsonl or hf://datasets/org/name@revision/*.parquet: .jsonl, .json, .csv, .tsv, .parquet; .gz and .zst beside them."
    )
    format: DataFormat = Field(
        DataFormat.AUTO,
        description="Shape of a row; `auto` recognises it by its keys. alpaca {instruction,input,output}, dolly {instruction,context,response}, "
        "prompt-completion {prompt,completion}, chat {messages:[{role,content}],tools}, sharegpt {conversations:[{from,value}]}, text {text}, "
        "p3 {inputs,targets}, unifiedqa {input,output}, unifiedskg {seq_in,seq_out}, natural-instructions {Definition,Instances}, "
        "self-instruct {instruction,instances}, oasst (trees, or messages of trees), ultrachat {data:[...]}, baize, oig (transcripts), coig, coig-exam.",
    )
    columns: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=256)]] = Field(
        default_factory=dict,
        max_length=16,
        description="Our key to the key of the file, where they differ: {instruction: question, output: answer}.",
    )
    template: str = Field(
        "",
        max_length=MAX_TEMPLATE,
        description="Jinja template for rows of any other shape: the question, then `|||`, then the answer, as in "
        "`Is this review good? {{text}} ||| {{choices[label]}}`. Another `|||` begins another right answer. Keys are the file's own.",
    )
    choices: list[Annotated[str, Field(max_length=1024)]] = Field(
        default_factory=list, max_length=1000, description="Texts of the classes, for the template's `choices[...]`."
    )
    targets: Targets = Field(
        Targets.ALL, description="Of several right answers in a row: learn all, each as an example of its own, or the first only."
    )
    split: Split = Field(
        Split.TRAIN, description="What the rows are for. `train` rows are split further by validationFraction and testFraction."
    )
    max_examples: int | None = Field(
        None, alias="maxExamples", ge=1, le=1_000_000_000, description="Take at most so many rows of this source."
    )
    license: str = Field(
        "",
        max_length=128,
        description="Licence of the data, carried into the lineage of the tuned model. Default: what the data card (README.md) beside the files says.",
    )

    @model_validator(mode="after")
    def _template_alone(self) -> "Source":
        if self.template and (self.format is not DataFormat.AUTO or self.columns):
            raise ValueError("with a template, format and columns say nothing: leave them out")
        if self.choices and not self.template:
            raise ValueError("choices are for a template: give one, or leave them out")
        return self


class NearDuplicates(Part):
    """Conversations that say nearly the same, by MinHash over runs of three words."""

    enabled: bool = Field(False, description="Drop a conversation that is nearly the same as an earlier one.")
    threshold: float = Field(
        0.8,
        ge=0.5,
        lt=1,
        description="Share of runs of three words that two conversations have in common from which on they are nearly the same.",
    )


class Cleaning(Part):
    """What is dropped before training; the report counts each drop by its reason."""

    deduplicate: bool = Field(True, description="Drop rows whose conversation occurred before.")
    near_duplicates: NearDuplicates = Field(
        default_factory=NearDuplicates,
        alias="nearDuplicates",
        description="Conversations that say nearly the same. With rows to test with, none of these is nearly the same as one to train on in any case.",
    )
    drop_refusals: bool = Field(
        False,
        alias="dropRefusals",
        description="Drop rows whose last answer declines: `I'm sorry, but ...`, `As an AI language model ...`.",
    )
    min_output_characters: int = Field(1, alias="minOutputCharacters", ge=0, le=1_000_000, description="Drop rows with a shorter answer.")
    max_characters: int = Field(
        100_000, alias="maxCharacters", ge=1, le=10_000_000, description="Drop longer rows, in characters of the whole conversation."
    )


_REF_ALONE: Final = "with ref, nothing else may be set: the InstructionDataset says how its data is prepared"
_NO_SOURCES: Final = "give at least one of sources, or ref"


def _rules(schema: dict[str, Any], model: type[Any]) -> None:
    """The rules of ``Dataset``; they hold for fields that are yet to be added, too."""
    schema |= Rules(
        ("self.validationFraction + self.testFraction < 1.0", "validationFraction and testFraction together must be below 1"),
        ("self.ref != '' || self.sources.size() > 0", _NO_SOURCES),
        ("self.sources.size() == 0 || self.sources.exists(s, s.split == 'train')", "at least one source must have split: train"),
        (f"self.ref == '' || ({' && '.join(untouched(model, but='ref'))})", _REF_ALONE),
    )


class Dataset(Part, json_schema_extra=_rules):
    """The instruction data and how it is prepared."""

    ref: str = Field(
        "",
        pattern=r"^$|" + DNS_NAME,
        max_length=253,
        description="Name of an InstructionDataset of this namespace, whose prepared data is used; nothing else of `dataset` may be set then.",
    )
    sources: list[Source] = Field(
        default_factory=list, max_length=MAX_SOURCES, description="Where the rows come from, in order; at least one, or `ref`."
    )
    shards: int = Field(
        1,
        ge=1,
        le=MAX_SHARDS,
        description="Pods that read the sources side by side; each takes a part of the files. One more pod joins what they have read.",
    )
    credentials_secret: SecretName = Field(
        "",
        alias="credentialsSecret",
        description="Secret of this namespace to read the sources with; keys as for spec.model.credentialsSecret.",
    )
    validation_fraction: float = Field(
        0.05,
        alias="validationFraction",
        ge=0,
        lt=1,
        description="Share of the train rows kept for validation, unless a source has split: validation.",
    )
    test_fraction: float = Field(
        0.0, alias="testFraction", ge=0, lt=1, description="Share of the train rows kept for testing and never trained on."
    )
    cleaning: Cleaning = Field(default_factory=Cleaning, description="What is dropped before training.")
    max_length: int = Field(2048, alias="maxLength", ge=8, le=1_048_576, description="Longest example, in tokens.")
    overlong: Overlong = Field(
        Overlong.TRUNCATE, description="What happens to longer examples: truncate (at the end), drop, or fail the job."
    )
    packing: bool = Field(
        True, description="Fill sequences of maxLength with several examples, kept apart from one another; no token is padding."
    )
    train_on: TrainOn = Field(
        TrainOn.RESPONSE, alias="trainOn", description="Which tokens are learned: every response, the last response only, or all tokens."
    )
    max_invalid_fraction: float = Field(
        0.0, alias="maxInvalidFraction", ge=0, lt=1, description="Share of unusable rows that is tolerated before the job fails."
    )

    forbidden_licenses: list[Annotated[str, Field(min_length=1, max_length=128)]] = Field(
        default_factory=list,
        alias="forbiddenLicenses",
        max_length=64,
        description="Licences that no source may have; `*` stands for anything, as in cc-by-nc-*, and `unknown` for sources that name none.",
    )

    @field_validator("sources")
    @classmethod
    def _some(cls, sources: list[Source], info: ValidationInfo) -> list[Source]:
        if not sources and info.data.get("ref") == "":
            raise ValueError(_NO_SOURCES)
        return sources

    @model_validator(mode="after")
    def _fractions(self) -> "Dataset":
        if self.ref and self.model_copy(update={"ref": ""}) != _UNTOUCHED:
            raise ValueError(_REF_ALONE)
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError("validationFraction and testFraction together must be below 1")
        if self.sources and not any(source.split is Split.TRAIN for source in self.sources):
            raise ValueError("at least one source must have split: train")
        return self

    @property
    def has_validation(self) -> bool:
        """Whether any rows are kept for validation; with ``ref`` only the InstructionDataset knows."""
        return self.validation_fraction > 0 or any(source.split is Split.VALIDATION for source in self.sources)


_UNTOUCHED: Final = Dataset.model_construct()


class DatasetStatus(Part):
    """What was prepared."""

    digest: str = Field("", max_length=128, description="Address of the prepared data: the same sources and options give the same.")
    train_examples: int = Field(0, alias="trainExamples", ge=0, description="Examples to train on.")
    validation_examples: int = Field(0, alias="validationExamples", ge=0, description="Examples to validate with.")
    test_examples: int = Field(0, alias="testExamples", ge=0, description="Examples kept for testing.")
    tokens: int = Field(0, ge=0, description="Tokens of the train examples.")
    trainable_tokens: int = Field(0, alias="trainableTokens", ge=0, description="Those of them that are learned.")
    rejected: int = Field(0, ge=0, description="Unusable rows and rows dropped by cleaning.")
    reused: bool = Field(False, description="Whether the data had been prepared before.")
    licenses: list[Annotated[str, Field(max_length=128)]] = Field(
        default_factory=list, max_length=MAX_SOURCES, description="Licences of the data."
    )
    report_uri: str = Field("", alias="reportUri", max_length=2048, description="The data report.")
