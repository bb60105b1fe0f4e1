"""What a data set says about itself: the content of `dataset.json`, validated strictly when read."""

from pathlib import PurePosixPath
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from data_pipeline.errors import PREPARE_AGAIN, DataError
from data_pipeline.storage import join_url, open_url

DESCRIPTION_FILE = "dataset.json"
FORMAT = "sctrain-shards-1"

Channels = Literal[1, 3]  # gray or RGB
Count = Annotated[int, Field(ge=1)]
Unit = Annotated[float, Field(ge=0, le=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class SplitDescription(_Strict):
    """One split: how many samples, where its index is, and which samples exactly (the index's fingerprint)."""

    samples: Count
    index: str  # file name beside dataset.json
    fingerprint: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class DatasetDescription(_Strict):
    """A folder of shards.

    Images are uint8 (channels, height, width); `mean` and `std` are those of the training split per channel, with
    pixels scaled to [0, 1].
    """

    format: Literal["sctrain-shards-1"] = FORMAT
    name: str
    classes: list[str] = Field(min_length=1)  # class number -> name
    channels: Channels
    height: Count
    width: Count
    splits: dict[str, SplitDescription]
    mean: list[Unit]
    std: list[Unit]
    licence: str
    source: str  # where the images came from
    skipped: list[str] = []  # unreadable samples of the source, which are not here
    enlarged: Annotated[int, Field(ge=0)] = 0  # samples whose source is smaller than they are
    recipe: dict[str, str | int | float]  # what decided the content: the same recipe gives the same bytes
    software: dict[str, str]  # versions that wrote it

    @property
    def shape(self) -> tuple[Channels, int, int]:
        """(C, H, W) of every image."""
        return self.channels, self.height, self.width

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise ValueError("mean and std need one value per channel")
        if "train" not in self.splits:
            raise ValueError("there is no split called train")
        for split in self.splits.values():
            if not is_plain_name(split.index):
                raise ValueError(f"{split.index!r} is not a plain file name")
        return self


def read_description(url: str) -> DatasetDescription:
    """The description of the data set in the folder `url`; DataError if it is absent or invalid."""
    path = join_url(url, DESCRIPTION_FILE)
    with open_url(path) as file:
        text = file.read()
    try:
        return DatasetDescription.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole file"
        raise DataError(f"{path} is not a valid description ({where}: {first['msg']}): {PREPARE_AGAIN}.") from error


def is_plain_name(name: str) -> bool:
    """Whether `name` is a visible file name and nothing that could lead out of its folder."""
    plain = name == PurePosixPath(name).name and "\\" not in name and name.isprintable()
    return plain and name != "" and not name.startswith(".")
