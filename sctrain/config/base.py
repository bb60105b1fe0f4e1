"""What every part of the run description is made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from sctrain.config.units import parse_count

Images = Annotated[int, BeforeValidator(parse_count), Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Width = Annotated[float, Field(gt=0, lt=0.28)]  # relative width of an EMA track, sigma_rel of EDM2


class Strict(BaseModel):
    """Unknown keys are errors; a loaded description never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
