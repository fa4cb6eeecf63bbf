"""The instruction data of a job or an InstructionDataset, and how it is prepared."""

from enum import StrEnum
from typing import Annotated, Any, Final

from pydantic import AfterValidator, Field, ValidationInfo, WithJsonSchema, field_validator, model_validator

from tunewright_crds.fields import DATA_PINNED, DNS_NAME, PIN_DATA, DataUri, Part, Rules, SecretName, claim_of, untouched

MAX_SOURCES: Final = 64
MAX_TEMPLATE: Final = 16_384
MAX_SHARDS: Final = 64
WEIGHT_TRAINS: Final = "weight is for rows to train on: each row to test or validate with counts once"
AGAINST_ENABLED: Final = "against is for a decontamination that is enabled"
NOTHING_HELD_OUT: Final = "decontaminate needs something to compare with: a source with split: test or validation, or against"
LANGUAGES: Final = (  # noqa: SIM905
    "af am an ar as az ba be bg bn br bs ca cs cy da de dz el en eo es et eu fa fi fo fr fy ga gd gl gu "
    "ha he hi hr ht hu hy id ig is it ja jv ka kk km kn ko ku ky la lb lg ln lo lt lv mg mk ml mn mr ms mt my ne "
    "nl nn no oc om or pa pl ps pt qu ro ru rw sa se si sk sl sn so sq sr st sv sw ta te tg th tk tl tr tt ug uk ur uz vi vo wa xh yo zh zu"
).split()
"""Codes (ISO 639-1) of the languages that the trainer tells apart."""


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
    PREFERENCE = "preference"
    UNPAIRED = "unpaired"
    PROMPT = "prompt"


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


class PersonalData(StrEnum):
    KEEP = "keep"
    DROP = "drop"
    MASK = "mask"


def _language(code: str) -> str:
    if code in LANGUAGES:
        return code
    raise ValueError(f"must be one of {', '.join(LANGUAGES)}")


Language = Annotated[str, AfterValidator(_language), WithJsonSchema({"type": "string", "enum": LANGUAGES})]


class Source(
    Part,
    json_schema_extra=Rules(
        ("self.template == '' || (self.format == 'auto' && self.columns.size() == 0)", "with a template, format and columns say nothing"),
        (f"!self.uri.startsWith('hf://') || self.uri.matches('{DATA_PINNED}')", PIN_DATA),
        ("self.choices.size() == 0 || self.template != ''", "choices are for a template"),
        ("self.split == 'train' || self.weight == 1.0", WEIGHT_TRAINS),
    ),
):
    """One source of instruction data."""

    uri: DataUri = Field(
        description="A file, a folder of files, or a pattern such as s3://bucket/**/part-*.jsonl hf://datasets/org/name@revision/*.parquet or pvc://claim/path: .jsonl, .json, .csv, .tsv, .parquet; .gz and .zst beside them."
    )
    format: DataFormat = Field(
        DataFormat.AUTO,
        description="Shape of a row; `auto` recognises it by its keys. alpaca {instruction,input,output}, dolly {instruction,context,response}, "
        "prompt-completion {prompt,completion}, chat {messages:[{role,content}],tools}, sharegpt {conversations:[{from,value}]}, text {text}, "
        "p3 {inputs,targets}, unifiedqa {input,output}, unifiedskg {seq_in,seq_out}, natural-instructions {Definition,Instances}, "
        "self-instruct {instruction,instances}, oasst (trees, or messages of trees), ultrachat {data:[...]}, baize, oig (transcripts), coig, coig-exam. "
        "With method.objective dpo or reward, rows are preference {prompt,chosen,rejected} or oasst, whose ranked answers are compared; with kto also unpaired {prompt,completion,label}, where label says whether the answer is good.",
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
        Targets.ALL,
        description="Of several right answers in a row, or pairs of answers to one prompt: learn all, each as an example of its own, or the first only.",
    )
    split: Split = Field(
        Split.TRAIN, description="What the rows are for. `train` rows are split further by validationFraction and testFraction."
    )
    max_examples: int | None = Field(
        None, alias="maxExamples", ge=1, le=1_000_000_000, description="Take at most so many rows of this source."
    )
    weight: float = Field(
        1.0,
        gt=0,
        le=100,
        description="How often each row to train on occurs in an epoch: 0.5 takes about half of the rows (always the same), 2 takes each twice, 2.5 takes each "
        "twice and half of them a third time. Counted after cleaning and splitting.",
    )
    license: str = Field(
        "",
        max_length=128,
        description="Licence of the data, carried into the lineage of the tuned model. Default: what the data card (README.md) beside the files says.",
    )

    @model_validator(mode="after")
    def _have_an_effect(self) -> "Source":
        if self.template and (self.format is not DataFormat.AUTO or self.columns):
            raise ValueError("with a template, format and columns say nothing: leave them out")
        if self.choices and not self.template:
            raise ValueError("choices are for a template: give one, or leave them out")
        if self.weight != 1 and self.split is not Split.TRAIN:
            raise ValueError(WEIGHT_TRAINS)
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


class Decontamination(
    Part,
    json_schema_extra=Rules(
        # The server checks the default, an empty object, as it stands.
        ("!has(self.against) || self.against.size() == 0 || self.enabled", AGAINST_ENABLED),
        (f"!has(self.against) || self.against.all(uri, !uri.startsWith('hf://') || uri.matches('{DATA_PINNED}'))", PIN_DATA),
    ),
):
    """Rows to train on that hold a piece of what is tested with."""

    enabled: bool = Field(
        False,
        description="Drop rows to train on that share a run of words with a row of the sources to test or validate with, or of `against`.",
    )
    words: int = Field(
        13, ge=5, le=100, description="So many words in a row. A row with fewer is compared whole; system messages are not compared."
    )
    against: list[DataUri] = Field(
        default_factory=list,
        max_length=16,
        description="Further files, folders or patterns to compare with, such as benchmarks, of any shape; read with dataset.credentialsSecret, never trained on.",
    )

    @model_validator(mode="after")
    def _enabled(self) -> "Decontamination":
        if self.against and not self.enabled:
            raise ValueError(AGAINST_ENABLED)
        return self


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
        description="Drop rows whose last answer (of a pair: chosen one) declines: `I'm sorry, but ...`, `As an AI language model ...`.",
    )
    min_output_characters: int = Field(
        1, alias="minOutputCharacters", ge=0, le=1_000_000, description="Drop rows with a shorter answer (of a pair: chosen one)."
    )
    max_characters: int = Field(
        100_000,
        alias="maxCharacters",
        ge=1,
        le=10_000_000,
        description="Drop longer rows, in characters of the whole conversation (of a pair: both answers).",
    )
    personal_data: PersonalData = Field(
        PersonalData.KEEP,
        alias="personalData",
        description="E-mail and public IP addresses, phone numbers, payment cards, IBANs, and national ids with a checksum: keep them, drop rows that "
        "hold them, or mask each by a word such as <EMAIL>. Names and postal addresses are not found.",
    )
    languages: list[Language] = Field(
        default_factory=list,
        max_length=32,
        description="Drop rows whose answers are in another language than these (ISO 639-1), as [en, de]; empty: none is dropped. Answers that are too "
        "short to tell stay.",
    )

    decontaminate: Decontamination = Field(
        default_factory=Decontamination, description="Rows to train on that hold a piece of what is tested with."
    )


_REF_ALONE: Final = "with ref, nothing else may be set: the InstructionDataset says how its data is prepared"
_NO_SOURCES: Final = "give at least one of sources, or ref"


def _rules(schema: dict[str, Any], model: type[Any]) -> None:
    """The rules of ``Dataset``; they hold for fields that are yet to be added, too."""
    schema |= Rules(
        (
            "!self.cleaning.decontaminate.enabled || self.cleaning.decontaminate.against.size() > 0 || self.sources.exists(s, s.split != 'train')",
            NOTHING_HELD_OUT,
        ),
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
        description="Pods that read the sources side by side, each a share of the files; one more joins what they have read. What is prepared does not depend on it.",
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
    max_length: int = Field(
        2048,
        alias="maxLength",
        ge=8,
        le=1_048_576,
        description="Longest example, in tokens; of a pair, each answer with its prompt; for an encoder-decoder (seq2seq) the longest prompt, and the longest answer.",
    )
    overlong: Overlong = Field(
        Overlong.TRUNCATE, description="What happens to longer examples: truncate (at the end), drop, or fail the job."
    )
    packing: bool = Field(
        True,
        description="Fill sequences of maxLength with several examples, kept apart from one another; no token is padding. Pairs of answers are not packed, nor is what an encoder-decoder reads.",
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

    @property
    def claims(self) -> list[str]:
        """The PersistentVolumeClaims that are read from, each once."""
        uris = [*(source.uri for source in self.sources), *self.cleaning.decontaminate.against]
        return sorted({claim for uri in uris if (claim := claim_of(uri))})

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
        against = self.cleaning.decontaminate
        if against.enabled and not against.against and all(source.split is Split.TRAIN for source in self.sources):
            raise ValueError(NOTHING_HELD_OUT)
        return self

    @property
    def has_validation(self) -> bool:
        """Whether any rows are kept for validation; with ``ref`` only the InstructionDataset knows."""
        return self.validation_fraction > 0 or any(source.split is Split.VALIDATION for source in self.sources)

    @property
    def has_test(self) -> bool:
        """Whether any rows are kept for testing; with ``ref`` only the InstructionDataset knows."""
        return self.test_fraction > 0 or any(source.split is Split.TEST for source in self.sources)


_UNTOUCHED: Final = Dataset.model_construct()


class DatasetStatus(Part):
    """What was prepared."""

    digest: str = Field("", max_length=128, description="Address of the prepared data: the same sources and options give the same.")
    train_examples: int = Field(0, alias="trainExamples", ge=0, description="Examples to train on.")
    validation_examples: int = Field(0, alias="validationExamples", ge=0, description="Examples to validate with.")
    test_examples: int = Field(0, alias="testExamples", ge=0, description="Examples kept for testing.")
    tokens: int = Field(0, ge=0, description="Tokens of the train examples.")
    trainable_tokens: int = Field(0, alias="trainableTokens", ge=0, description="Those of them that are learned.")
    rejected: int = Field(
        0, ge=0, description="Unusable rows, rows dropped by cleaning, and rows not drawn because of their source's weight."
    )
    reused: bool = Field(False, description="Whether the data had been prepared before.")
    licenses: list[Annotated[str, Field(max_length=128)]] = Field(
        default_factory=list, max_length=MAX_SOURCES, description="Licences of the data."
    )
    report_uri: str = Field("", alias="reportUri", max_length=2048, description="The data report.")
