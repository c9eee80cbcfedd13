"""Keep the libraries' own talk off the terminal, which belongs to the stage's lines."""

import logging
import os
import warnings

import torch


def name_accelerator() -> None:
    """Tell DeepSpeed that there is no GPU, before it is imported: it warns on every rank that it found none."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def quieten_libraries() -> None:
    """No progress bars, and no warnings that a user cannot act on; the others still come through."""
    import transformers

    deepspeed = logging.getLogger("DeepSpeed")
    deepspeed.setLevel(logging.WARNING)
    # Said by every rank that loads a universal checkpoint; we have no tensor parallelism.
    deepspeed.addFilter(lambda record: not record.getMessage().startswith("MPU is not provided"))
    logging.getLogger("torch.utils.flop_counter").setLevel(logging.ERROR)  # without a GPU it misses triton
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    transformers.utils.logging.disable_progress_bar()
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"  # for when it is imported: few ranks need to
