"""What a data set says about itself: the content of `dataset.json`, validated strictly when read."""

from pathlib import PurePosixPath
from typing import Annotated, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from data_pipeline.errors import PREPARE_AGAIN, DamagedError
from data_pipeline.looks import look_again
from data_pipeline.storage import join_url, open_url

DESCRIPTION_FILE = "dataset.json"
FORMAT = "sctrain-shards-1"

Channels = Literal[1, 3]  # gray or RGB
MOST_ELEMENTS = 2**28  # of one image or latent: what a description may make a reader allocate
Count = Annotated[int, Field(ge=1)]
Unsigned = Annotated[float, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class SplitDescription(_Strict):
    """One split: how many samples, where its index is, and which samples exactly (the index's fingerprint)."""

    samples: Count
    index: str  # file name beside dataset.json
    fingerprint: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class LatentDescription(_Strict):
    """Latents in the place of images: what the `.npy` of a sample holds and how it came about.

    `mean`: one latent of each image (C, H, W). `mean_std`: the encoder's Gaussian, means above standard deviations
    (2C, H, W), from which every visit draws another latent.
    """

    encoder: str  # which auto-encoder
    dtype: Literal["float16", "float32", "uint8"]
    content: Literal["mean", "mean_std"]
    convention: str  # what the encoder saw and what was done to its output


class DatasetDescription(_Strict):
    """A folder of shards.

    Images are uint8 (channels, height, width); `mean` and `std` are those of the training split per channel, with
    pixels scaled to [0, 1]. Where there are `latents`, these stand for the images: (channels, height, width), and
    `mean` and `std` are theirs as they are.
    """

    format: Literal["sctrain-shards-1"] = FORMAT
    name: str
    classes: list[str] = Field(min_length=1)  # class number -> name
    channels: Count
    height: Count
    width: Count
    splits: dict[str, SplitDescription]
    mean: list[float]
    std: list[Unsigned]
    latents: LatentDescription | None = None
    licence: str
    source: str  # where the images came from
    skipped: list[str] = []  # unreadable samples of the source, which are not here
    enlarged: Annotated[int, Field(ge=0)] = 0  # samples whose source is smaller than they are
    recipe: dict[str, str | int | float]  # what decided the content: the same recipe gives the same bytes
    software: dict[str, str]  # versions that wrote it

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image or latent."""
        return self.channels, self.height, self.width

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.latents is None:
            self._check_images()
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise ValueError("mean and std need one value per channel")
        if self.channels * self.height * self.width > MOST_ELEMENTS:
            raise ValueError("channels, height and width are more than a sample can have")
        if "train" not in self.splits:
            raise ValueError("there is no split called train")
        for split in self.splits.values():
            if not is_plain_name(split.index):
                raise ValueError(f"{split.index!r} is not a plain file name")
        return self

    def _check_images(self) -> None:
        if self.channels not in get_args(Channels):
            raise ValueError("channels must be 1 or 3 where there are no latents")
        if not all(0 <= value <= 1 for value in self.mean + self.std):
            raise ValueError("mean and std of images lie between 0 and 1")


def read_description(url: str) -> DatasetDescription:
    """The description of the data set in the folder `url`; DataError if it is absent or invalid."""
    path = join_url(url, DESCRIPTION_FILE)
    return look_again([path], lambda: _parsed(path))


def _parsed(path: str) -> DatasetDescription:
    with open_url(path) as file:
        text = file.read()
    try:
        return DatasetDescription.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole file"
        raise DamagedError(f"{path} is not a valid description ({where}: {first['msg']}): {PREPARE_AGAIN}.") from error


def is_plain_name(name: str) -> bool:
    """Whether `name` is a visible file name and nothing that could lead out of its folder."""
    plain = name == PurePosixPath(name).name and "\\" not in name and name.isprintable()
    return plain and name != "" and not name.startswith(".")
