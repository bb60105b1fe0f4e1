"""The networks of a run by the part that they have in it, without weights: what a plan counts."""

from __future__ import annotations

import math

from data_pipeline.description import DatasetDescription
from models.discriminator import Discriminator
from models.score import Score
from sctrain import building
from sctrain.blueprint import Blueprint
from sctrain.config.objectives import TrigFlowObjective
from sctrain.config.schema import RunConfig
from sctrain.runs import RunFolder
from sctrain.snapshots import newest, newest_images, snapshot_config

STUDENT, TARGET, TEACHER, GUIDE = "student", "target", "teacher", "guide"
SCORE, DISCRIMINATOR = "fake score", "discriminator"
TRAINED = {STUDENT, SCORE, DISCRIMINATOR}  # the last two beside the first


def cast(config: RunConfig, about: DatasetDescription) -> dict[str, Blueprint]:
    """By part, the student first. A teacher has the student's shape, which the run will insist on."""
    method = config.objective
    found = {STUDENT: building.blueprint(config, about)}
    if method.has_target:
        found[TARGET] = found[STUDENT]
    if method.distils and not method.target_teaches:
        found[TEACHER] = building.blueprint(config.model_copy(update={"objective": TrigFlowObjective()}), about)
    if config.guide is not None:
        found[GUIDE] = building.blueprint(guide_config(config), about)
    if method.scores is not None:
        found[SCORE] = building.blueprint(config, about, Score)
    if method.discriminates is not None:
        width, classes = method.discriminates.width, len(about.classes)
        found[DISCRIMINATOR] = Blueprint(lambda: Discriminator(width, *about.shape, classes))
    return found


def guide_config(config: RunConfig) -> RunConfig:
    """The run as if its guide were its network; as large as the student where the guide is not there yet."""
    network = config.network
    if config.guide is not None and guide_is_there(config):
        images = config.guide.images or newest_images(config.guide.run)
        network = snapshot_config(config.guide.run, images).network
    return config.model_copy(update={"network": network, "objective": TrigFlowObjective()})


def guide_is_there(config: RunConfig) -> bool:
    """Whether the guide's run has published what tells its shape."""
    return config.guide is not None and newest(RunFolder(config.guide.run).snapshots) is not None


def sizes(network: Blueprint) -> list[int]:
    """Elements of each parameter."""
    return [math.prod(shape) for shape in network.shapes.values()]
