"""Export of a checkpoint to a folder that transformers, peft and vLLM load: weights, tokenizer, template, model card.

DeepSpeed is not needed, because every checkpoint has the weights, or the adapter, in Hugging Face's format. The folder
is written under a temporary name and loaded again. It is renamed to its final name only if its logits are those of the
trained weights.

Decoder layers stay on disk until they are needed. So a fully tuned model of any size takes the memory of its
embeddings, one layer and one shard. A model with an adapter is held in memory once, in float32, to be merged.
"""

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from cluster.config import ModelConfig, SecretRef
from cluster.errors import InputError, TunesmithError
from cluster.files import follow_umask, write_json
from cluster.log import stage_logger
from cluster.run.fence import own_token, verify
from cluster.run.manifest import is_sealed, verify_manifest, write_manifest
from trainer.checkpoint.commit import explain_failed_write
from trainer.checkpoint.state import read_state
from trainer.config.tuning import form_refusal
from trainer.data.template import ChatTemplate
from trainer.export_job import ExportJob, choose_checkpoint, export_key
from trainer.model.adapters import BASE_FILE, load_adapter
from trainer.model.bottleneck import CONFIG_FILE, WEIGHTS_FILE
from trainer.model.load import DTYPES
from trainer.model.tokenizer import load_tokenizer

log = stage_logger("export")
CARD_TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
CHECK_TEXT = "The quick brown fox jumps over the lazy dog. 1 2 3"
# Of the largest logit. Float32 arithmetic in another order changes logits by about 1e-6 of it.
LOGIT_TOLERANCE = 1e-4
ROUNDED_TOLERANCE = 5e-2  # for trained float32 weights that are exported as bf16
MERGE_TOLERANCE = (2e-5, 0.1)  # of the largest logit; of what training changed. The larger one holds


def run(job: ExportJob) -> dict:
    """Export the newest or best checkpoint of a run. Returns the result. An export that exists is not made again.

    Raises InputError if there is no complete checkpoint, and TunesmithError if the exported logits differ.
    """
    source = choose_checkpoint(job)
    if job.config.checkpoint == "newest" and not read_state(source).finished:
        log.info(f"{source} is not the last checkpoint of its training. It is exported anyway")
    verify_manifest(source, below="weights")
    key = export_key(source, job.config, job.name)
    result = job.run.read_result("export") or {}
    exists = is_sealed(job.run.export) and verify_manifest(job.run.export).get("key") == key
    if not exists or result.get("status") != "done":
        result = write_export(job, source, key)
    if job.config.to is not None:
        result["uploaded_to"] = upload(job.run.export, job.config.to, job.config.hub_token)
    verify(job.run.root)
    write_json(job.run.result("export"), result)
    job.run.event("export", "done", folder=str(job.run.export))
    return result


def write_export(job: ExportJob, source: Path, key: str) -> dict:
    """Write the export of the checkpoint `source`, check it, and replace an older one. Returns the result."""
    verify(job.run.root)
    for stale in job.run.root.glob(f".{job.run.export.name}.partial*"):
        shutil.rmtree(stale, ignore_errors=True)
    partial = job.run.export.with_name(f".{job.run.export.name}.partial{own_token() or ''}")
    tokenizer, _ = load_tokenizer(job.model, job.train.chat_template)
    with explain_failed_write(job.run.root):
        expected = write_model(job, source, tokenizer, partial)
        error = check_logits(job, expected, tokenizer, partial)
        model_card(job, source, error).save(partial / "README.md")
        files = sorted(str(path.relative_to(partial)) for path in partial.rglob("*") if path.is_file())
        follow_umask(partial)
        write_manifest(partial, files, key=key, checkpoint=source.name)
        verify(job.run.root)
        shutil.rmtree(job.run.export, ignore_errors=True)
        partial.rename(job.run.export)
    num_bytes = sum(path.stat().st_size for path in job.run.export.rglob("*.safetensors"))
    return {
        "status": "done", "form": job.config.form, "folder": str(job.run.export), "checkpoint": str(source),
        "weights_bytes": num_bytes, "max_logit_error": error,
    }  # fmt: skip


def write_model(job: ExportJob, source: Path, tokenizer: PreTrainedTokenizerFast, folder: Path) -> torch.Tensor:
    """Write the tokenizer and the weights into `folder`, merged or as an adapter.

    Returns the logits that the export should have for CHECK_TEXT [1, S, V]: those of the trained model or, if its
    adapter is merged, of the rounded weights.
    """
    if (why := form_refusal(job.train.tuning, job.config.form)) is not None:
        raise InputError(f"{why}.")
    folder.mkdir(parents=True)
    tokenizer.save_pretrained(folder)
    dtype = DTYPES[job.train.precision if job.config.dtype == "same" else job.config.dtype]
    if job.train.tuning == "full":
        with layers_on_disk(source / "weights", torch.float32) as trained:
            expected = logits_of(trained, tokenizer)
        with layers_on_disk(source / "weights", dtype) as trained:
            save_merged(trained, job, tokenizer, folder)
        return expected
    adapted = _load_adapted(job.model, source / "weights", tokenizer)
    if job.config.form == "adapter":
        for file in (CONFIG_FILE, WEIGHTS_FILE, BASE_FILE):
            shutil.copyfile(source / "weights" / file, folder / file)
        return logits_of(adapted, tokenizer)
    merged, expected = merge(adapted, tokenizer, dtype)
    save_merged(merged, job, tokenizer, folder)
    return expected


def merge(
    adapted: PeftModel, tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype
) -> tuple[PreTrainedModel, torch.Tensor]:
    """The base with the adapter in its weights, rounded to `dtype`, and its logits for CHECK_TEXT. [1, S, V]

    Before rounding, the merged model must answer as the adapter does, measured against what training changed. Raises
    TunesmithError if it does not. Rounding that moves the logits by more than half of this change is logged.
    """
    expected = logits_of(adapted, tokenizer)
    with adapted.disable_adapter():
        change = float((logits_of(adapted, tokenizer) - expected).abs().max())
    merged = adapted.merge_and_unload()
    error, largest = float((logits_of(merged, tokenizer) - expected).abs().max()), float(expected.abs().max())
    if not error <= max(MERGE_TOLERANCE[0] * largest, min(LOGIT_TOLERANCE * largest, MERGE_TOLERANCE[1] * change)):
        raise TunesmithError(
            f"the merged model gives other logits than the base with its adapter: they differ by {error:.2g}, and "
            f"training changed them by {change:.2g}. No export was written. Set export.form=adapter."
        )
    for parameter in merged.parameters():
        parameter.data = parameter.data.to(dtype).float()
    rounded = logits_of(merged, tokenizer)
    loss = float((rounded - expected).abs().max())
    if loss > change / 2:
        log.warning(
            f"rounding the merged weights to {str(dtype).removeprefix('torch.')} moves the logits by {loss:.2g}, and "
            f"training moved them by {change:.2g}. export.form=adapter and export.dtype=fp32 do not round"
        )
    return merged.to(dtype), rounded


@contextmanager
def layers_on_disk(folder: Path, dtype: torch.dtype) -> Iterator[PreTrainedModel]:
    """A model of `dtype` that reads each decoder layer from its files when the layer is used."""
    with torch.device("meta"):
        shape = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    layers = [name for name, module in shape.named_modules() if isinstance(module, GradientCheckpointingLayer)]
    inside = tuple(f"{name}." for name in layers)
    others = {name.rpartition(".")[0] for name in shape.state_dict() if not name.startswith(inside)}
    device_map = dict.fromkeys(sorted(others), "cpu") | dict.fromkeys(layers, "disk")
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as spare:  # for weights that have another form in the files
        yield AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            device_map=device_map,
            offload_folder=spare,
        ).eval()


def _load_adapted(model: ModelConfig, adapter: Path, tokenizer: PreTrainedTokenizerFast) -> torch.nn.Module:
    """The base with an adapter, in float32, which represents bf16 exactly, so that merging rounds only once."""
    base = AutoModelForCausalLM.from_pretrained(
        model.path, revision=model.revision, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
    )
    return load_adapter(base.eval(), adapter, model.revision, tokenizer.num_embeddings)


def save_merged(lm: PreTrainedModel, job: ExportJob, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a whole model, one shard at a time."""
    lm.generation_config = GenerationConfig()  # that of the base, completed, is written below
    lm.config.use_cache = True
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded modules")  # on purpose
        lm.save_pretrained(folder, safe_serialization=True, max_shard_size=job.config.max_shard_size)
    write_json(folder / GENERATION_CONFIG_NAME, generation_settings(job, tokenizer))


def generation_settings(job: ExportJob, tokenizer: PreTrainedTokenizerFast) -> dict:
    """The content of generation_config.json: that of the base, and the tokens that end a turn of the template."""
    file = cached_file(
        job.model.path,
        GENERATION_CONFIG_NAME,
        revision=job.model.revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    settings = json.loads(Path(file).read_text()) if file else {}
    settings.pop("_from_model_config", None)  # transformers may replace such settings by those of config.json
    known = settings.get("eos_token_id")
    ends = {tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])}
    if job.train.objective == "chat":
        ends.update(ChatTemplate(tokenizer).ends.values())
    return settings | {"eos_token_id": sorted(ends - {None}), "pad_token_id": tokenizer.pad_token_id}


def logits_of(lm: torch.nn.Module, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    ids = tokenizer(CHECK_TEXT, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        return lm(input_ids=ids).logits


def check_logits(job: ExportJob, expected: torch.Tensor, tokenizer: PreTrainedTokenizerFast, folder: Path) -> float:
    """Load `folder` as a user would, and compare its logits with those that it should have, both in float32.

    Returns the largest difference as a fraction of the largest logit. Raises TunesmithError above the tolerance.
    """
    if job.config.form == "adapter":
        found = logits_of(_load_adapted(job.model, folder, tokenizer), tokenizer)
    else:
        with layers_on_disk(folder, torch.float32) as loaded:
            found = logits_of(loaded, tokenizer)
    error = float((expected - found).abs().max() / expected.abs().max())
    is_rounded = job.train.tuning == "full" and job.train.precision == "fp32" and job.config.dtype == "bf16"
    if not error <= (ROUNDED_TOLERANCE if is_rounded else LOGIT_TOLERANCE):
        raise TunesmithError(
            f"{folder}: the exported model gives other logits than the trained one (by {error:.2%} of the largest). "
            "No export was written, and the checkpoint is unchanged."
        )
    return error


def model_card(job: ExportJob, source: Path, error: float) -> ModelCard:
    """The model card: base, data and training, from the recipe and the results of the run."""
    state = read_state(source)
    return ModelCard.from_template(
        ModelCardData(
            base_model=None if Path(job.model.path).exists() else job.model.path,
            library_name="peft" if job.config.form == "adapter" else "transformers",
            pipeline_tag="text-generation",
            tags=["instruction-tuning", "tunesmith"],
        ),
        template_path=str(CARD_TEMPLATE),
        name=job.name,
        base=Path(job.model.path).name if Path(job.model.path).exists() else job.model.path,
        revision=job.model.revision,
        train=job.train,
        zero_stage=json.loads(job.run.zero.read_text())["zero_stage"],
        state=state,
        form=job.config.form,
        data=[Path(source.path).name for source in job.train.data],
        synthesis=None if job.train.data else job.run.read_result("synthesize"),
        error=error,
    )


def upload(folder: Path, target: str, secret: SecretRef | None) -> str:
    """Upload an export to `hub:<org>/<name>`, a private repository. Returns its address.

    secret: None means that huggingface_hub finds the token. Raises InputError if `target` or `secret` is wrong.
    """
    scheme, _, repo_id = target.partition(":")
    if scheme != "hub" or repo_id.count("/") != 1:
        raise InputError(f"export.to: {target!r} is not hub:<org>/<name>. Set export.to=hub:<org>/<name>.")
    if secret is not None and not os.environ.get(secret.env):
        raise InputError(f"export.hub_token: the environment variable {secret.env} is not set. Set it to the token.")
    api = HfApi(token=os.environ[secret.env] if secret is not None else None)
    api.create_repo(repo_id, private=True, exist_ok=True)
    return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Export of a tunesmith run"))
