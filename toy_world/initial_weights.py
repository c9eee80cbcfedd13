"""The initial weights of the base model: random, with a few circuits built in.

A small transformer spends most of its first million tokens on finding that it can copy. Starting near the solution
saves that time (Trockman and Kolter 2023, "Mimetic initialization of self-attention layers", arXiv 2305.09828, do so
for attention's products of weights). Here:

- tokens of one word, with or without a space before them and in any casing, start close to each other;
- numbers start on a curve with the periods that trained models are known to use (Kantamneni and Tegmark 2025,
  "Language models use trigonometry to do addition", arXiv 2502.00873), and the words that are sorted on one in
  alphabetical order;
- two heads of layer 0 look at the previous token, and keep what it was in a place of its own;
- the heads of layer 1 look for an earlier place where the previous token was the current one, and copy what stands
  there: induction heads (Olsson et al. 2022, arXiv 2209.11895).

All of it is then trained like any other weight.
"""

import math

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from toy_world import words

CONSTANT_SHARE = 0.4  # of a token's vector: what is the same in all, for heads that look at positions alone
STEM_SHARE, FORM_SHARE, OWN_SHARE = 0.8, 0.35, 0.3
NUMBER_PERIODS = (2, 5, 10, 100, 200)
ORDER_PERIODS = (15, 40, 120)  # of the place in alphabetical order
CURVE_SHARE, ORDER_SHARE = 0.7, 0.5
PREVIOUS_LOGIT = 36.0  # squared length of a position query, per frequency: a margin of about 4 over the next offset
NUM_POSITION_FREQUENCIES = 7
MATCH_SCALE = 2.2
KEPT_GAIN, COPY_GAIN = 2.0, 4.5


@torch.no_grad()
def initialize_weights(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    """Overwrite the embeddings and the attention of the first two layers of a freshly made `model`, in place."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    width, head = config.hidden_size, config.hidden_size // config.num_attention_heads
    constant = _unit(width, generator)
    model.get_input_embeddings().weight.copy_(_embeddings(tokenizer, width, constant, generator))
    # Rows of an orthonormal basis: projections that carry a token's identity through a head, in pieces of `head`.
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    place = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    basis, place = (rows - torch.outer(rows @ constant, constant) for rows in (basis, place))
    first, second = model.model.layers[0].self_attn, model.model.layers[1].self_attn
    for layer in model.model.layers:
        layer.mlp.down_proj.weight *= 0.25  # near nothing at first, so that what heads write can be read
        layer.self_attn.o_proj.weight *= 0.25
    num_previous = 2
    for number in range(num_previous):
        rows = slice(number * head, (number + 1) * head)
        query, key = _position_pair(head, config.rope_parameters["rope_theta"])
        gain = 1 / (CONSTANT_SHARE * math.sqrt(width))
        first.q_proj.weight[rows] = gain * torch.outer(query, constant)
        first.k_proj.weight[rows] = gain * torch.outer(key, constant)
        first.v_proj.weight[rows] = basis[rows]
        first.o_proj.weight[:, rows] = place[rows].T * (KEPT_GAIN / math.sqrt(width))
    still = head // 4  # of each half of a head, the dimensions that rotate fast carry nothing
    for number in range(config.num_attention_heads):
        rows = slice(number * head, (number + 1) * head)
        source = slice((number % num_previous) * head, (number % num_previous + 1) * head)
        mix = torch.linalg.qr(torch.randn(head, head, generator=generator))[0]
        mix[:still] = 0
        mix[head // 2 : head // 2 + still] = 0
        second.q_proj.weight[rows] = MATCH_SCALE * mix @ basis[source]
        second.k_proj.weight[rows] = MATCH_SCALE * mix @ place[source]
        second.v_proj.weight[rows] = basis[rows]
        second.o_proj.weight[:, rows] = basis[rows].T * (COPY_GAIN / math.sqrt(width))


def _unit(width: int, generator: torch.Generator) -> torch.Tensor:
    vector = torch.randn(width, generator=generator)
    return vector / vector.norm()


def _position_pair(head: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Query and key vectors [head] whose product, after rotary embedding, is largest at the previous position."""
    half = head // 2
    frequencies = theta ** (-torch.arange(half) / half)
    query = torch.zeros(head)
    query[:NUM_POSITION_FREQUENCIES] = math.sqrt(PREVIOUS_LOGIT)
    key = torch.zeros(head)
    key[:half] = query[:half] * torch.cos(frequencies)
    key[half:] = query[:half] * torch.sin(frequencies)
    return query, key


def _embeddings(
    tokenizer: PreTrainedTokenizerFast, width: int, constant: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Unit vectors [V, width]: a part for the word (numbers: a place on a curve), one for its form, one of its own."""
    stems: dict[str, torch.Tensor] = {}
    forms: dict[tuple[bool, bool, bool], torch.Tensor] = {}
    number_axes = torch.randn(2 * len(NUMBER_PERIODS), width, generator=generator) / math.sqrt(width)
    order_axes = torch.randn(2 * len(ORDER_PERIODS), width, generator=generator) / math.sqrt(width)
    order = {word: rank for rank, word in enumerate(sorted(words.SPELLED_WORDS))}
    vectors = torch.zeros(len(tokenizer), width)
    for piece, index in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        bare = piece.removeprefix("Ġ")
        form = (bare != piece, bare.isupper() and len(bare) > 1, bare.istitle())
        stem = stems.setdefault(bare.casefold(), _unit(width, generator))
        if bare in words.NUMBERS:
            stem = CURVE_SHARE * _on_curve(int(bare), NUMBER_PERIODS) @ number_axes + (1 - CURVE_SHARE) * stem
        elif bare.casefold() in order:
            place = _on_curve(order[bare.casefold()], ORDER_PERIODS) @ order_axes
            stem = ORDER_SHARE * place + math.sqrt(1 - ORDER_SHARE**2) * stem
        vectors[index] = STEM_SHARE * stem + FORM_SHARE * forms.setdefault(form, _unit(width, generator))
        vectors[index] += OWN_SHARE * _unit(width, generator)
    # Exactly the same share of the constant in every token, or positions could not be told apart from words.
    vectors -= torch.outer(vectors @ constant, constant)
    vectors *= math.sqrt(1 - CONSTANT_SHARE**2) / vectors.norm(dim=1, keepdim=True)
    return vectors + CONSTANT_SHARE * constant


def _on_curve(value: int, periods: tuple[int, ...]) -> torch.Tensor:
    """A point [2 * periods] of about unit length: near values are near, and so are values a period apart."""
    angles = [2 * math.pi * value / period for period in periods]
    scale = 1 / math.sqrt(len(periods))
    return torch.tensor([scale * f(angle) for angle in angles for f in (math.cos, math.sin)])
