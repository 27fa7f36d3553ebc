"""The sections of the report in the order of the page: a new one is a file here and a line below."""

from __future__ import annotations

from tunesmith.pages.sections.ability import ABILITY, CONTAMINATION
from tunesmith.pages.sections.confusion import CONFUSION
from tunesmith.pages.sections.cost import COST
from tunesmith.pages.sections.data import DATA
from tunesmith.pages.sections.forgetting import FORGETTING
from tunesmith.pages.sections.gate import GATE
from tunesmith.pages.sections.loss import LOSS
from tunesmith.pages.sections.memorisation import MEMORISATION
from tunesmith.pages.sections.metrics import INTERVALS, METRICS
from tunesmith.pages.sections.record import COMMAND, ENVIRONMENT, SETTINGS, WARNINGS
from tunesmith.pages.sections.rollouts import ROLLOUTS
from tunesmith.pages.sections.samples import SAMPLES
from tunesmith.pages.sections.section import Section
from tunesmith.pages.sections.seeds import SEEDS

SECTIONS: tuple[Section, ...] = (
    GATE,
    METRICS,
    INTERVALS,
    SEEDS,
    CONFUSION,
    FORGETTING,
    ABILITY,
    MEMORISATION,
    SAMPLES,
    LOSS,
    ROLLOUTS,
    DATA,
    CONTAMINATION,
    COST,
    WARNINGS,
    SETTINGS,
    ENVIRONMENT,
    COMMAND,
)
