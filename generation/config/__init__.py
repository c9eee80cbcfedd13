"""The `synthesize` section of a recipe: one config model a method, chosen by `method`.

It imports pydantic alone and does no I/O.
"""

from typing import Annotated

from pydantic import Discriminator, Tag

from generation.config.alpaca import AlpacaConfig
from generation.config.answer_only import AnswerOnlyConfig
from generation.config.common import BudgetConfig, JudgeConfig, Role, RoleConfig, RolesConfig, SynthesisConfig
from generation.config.evol_instruct import EvolInstructConfig
from generation.config.instruction_wild import InstructionWildConfig
from generation.config.magpie import MagpieConfig
from generation.config.rejection_sampling import RejectionSamplingConfig
from generation.config.self_instruct import SelfInstructConfig

DEFAULT_METHOD = "self_instruct"


def _method_of(section: object) -> object:
    if isinstance(section, dict):
        return section.get("method", DEFAULT_METHOD)
    return getattr(section, "method", None)


SynthesizeConfig = Annotated[
    Annotated[SelfInstructConfig, Tag("self_instruct")]
    | Annotated[AlpacaConfig, Tag("alpaca")]
    | Annotated[InstructionWildConfig, Tag("instruction_wild")]
    | Annotated[EvolInstructConfig, Tag("evol_instruct")]
    | Annotated[MagpieConfig, Tag("magpie")]
    | Annotated[AnswerOnlyConfig, Tag("answer_only")]
    | Annotated[RejectionSamplingConfig, Tag("rejection_sampling")],
    Discriminator(_method_of),
]
METHOD_CONFIGS: dict[str, type[SynthesisConfig]] = {
    config.model_fields["method"].default: config
    for config in (
        SelfInstructConfig,
        AlpacaConfig,
        InstructionWildConfig,
        EvolInstructConfig,
        MagpieConfig,
        AnswerOnlyConfig,
        RejectionSamplingConfig,
    )
}

__all__ = [
    "DEFAULT_METHOD",
    "METHOD_CONFIGS",
    "AlpacaConfig",
    "AnswerOnlyConfig",
    "BudgetConfig",
    "EvolInstructConfig",
    "InstructionWildConfig",
    "JudgeConfig",
    "MagpieConfig",
    "RejectionSamplingConfig",
    "Role",
    "RoleConfig",
    "RolesConfig",
    "SelfInstructConfig",
    "SynthesisConfig",
    "SynthesizeConfig",
]
