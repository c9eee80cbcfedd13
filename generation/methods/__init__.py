"""The synthesis methods by their name in a recipe."""

from generation.method import Method
from generation.methods.alpaca import Alpaca
from generation.methods.answer_only import AnswerOnly
from generation.methods.evol_instruct import EvolInstruct
from generation.methods.instruction_wild import InstructionWild
from generation.methods.magpie import Magpie
from generation.methods.rejection_sampling import RejectionSampling
from generation.methods.self_instruct import SelfInstruct

METHODS: dict[str, type[Method]] = {
    method.NAME: method
    for method in (SelfInstruct, Alpaca, InstructionWild, EvolInstruct, Magpie, AnswerOnly, RejectionSampling)
}
