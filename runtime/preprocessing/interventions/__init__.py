"""Image interventions: the same image, changed in ways that leave its class alone (docs/interventions.md)."""

from invariclip.preprocessing.interventions.base import DonorIntervention, Intervention, Range, parameter
from invariclip.preprocessing.interventions.catalogue import (
    CATALOGUE,
    GROUPS,
    PAPER,
    InterventionRequest,
    Kind,
    choose_kinds,
    intervene,
    kinds_of,
    parse_kinds,
    read_kinds,
    resolve,
)

__all__ = [
    "CATALOGUE",
    "GROUPS",
    "PAPER",
    "DonorIntervention",
    "Intervention",
    "InterventionRequest",
    "Kind",
    "Range",
    "choose_kinds",
    "intervene",
    "kinds_of",
    "parameter",
    "parse_kinds",
    "read_kinds",
    "resolve",
]
