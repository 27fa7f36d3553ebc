"""Whether to fine-tune at all: rules with their sources, applied to answers and a data file."""

from tunesmith.plan.advise.advice import Advice, advise
from tunesmith.plan.advise.answers import Answers, read_answers
from tunesmith.plan.advise.data_look import DataLook, look_at

__all__ = ["Advice", "Answers", "DataLook", "advise", "look_at", "read_answers"]
