"""Loads a base's configuration, tokenizer and weights.

Invariant: what is returned is whole. A model with a weight missing, of another shape or
damaged is a ConfigError, never a model with random parts; nothing is read from a pickle.
"""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from s2ft_ray.bases.folders import base_name, local_folder
from s2ft_ray.bases.mapped import map_base_model
from s2ft_ray.config import ModelConfig, s2ft_home
from s2ft_ray.errors import ConfigError

logger = logging.getLogger(__name__)
# What transformers raises for files that are damaged, foreign, or need what isn't installed.
LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError)
TRIAL_TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def load_model_config(model: ModelConfig) -> PretrainedConfig:
    """Load the base's configuration, without its weights."""
    folder = local_folder(model, weights=False)
    try:
        config = AutoConfig.from_pretrained(
            folder, trust_remote_code=model.trust_remote_code, local_files_only=True
        )
    except LOAD_ERRORS as error:
        raise _fault(model, "its config.json can't be used", error) from error
    config._name_or_path = base_name(model.name_or_path)
    return config


def load_base_model(model: ModelConfig, *, mapped: bool = False) -> PreTrainedModel:
    """Load the base on the CPU, in eval mode, named as ``base_name`` says.

    With `mapped` its weights stay in their files where they can (see ``mapped``): for a base
    that is sharded next.
    """
    folder = local_folder(model, weights=True)
    config = load_model_config(model)
    base = _map(folder, config, model) if mapped else None
    if base is None:
        base = _load(folder, config, model)
    base.name_or_path = base.config._name_or_path = base_name(model.name_or_path)
    return base.eval()


def _map(folder: Path, config: PretrainedConfig, model: ModelConfig) -> PreTrainedModel | None:
    try:
        base = map_base_model(
            folder,
            config,
            model,
            cache=s2ft_home() / "cache" / "bases",
            load=partial(_load, folder, config, model),
        )
    except ConfigError:
        raise
    except (*LOAD_ERRORS, SafetensorError) as error:
        raise _fault(model, "its weights can't be loaded", error) from error
    if base is None:
        logger.info("each worker loads %s whole before it is sharded", model.name_or_path)
    return base


def _load(
    folder: Path, config: PretrainedConfig, model: ModelConfig, **placing: Any
) -> PreTrainedModel:
    """Load the model; `placing` are ``from_pretrained``'s own options of where its weights go."""
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # else one bar per worker in the job's log
    try:
        base, loaded = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=model.dtype,
            attn_implementation=model.attn_implementation,
            trust_remote_code=model.trust_remote_code,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **placing,
        )
    except (*LOAD_ERRORS, SafetensorError) as error:
        raise _fault(model, "its weights can't be loaded", error) from error
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise ConfigError(
            f"model.name_or_path: {model.name_or_path} lacks {len(missing)} weights of its"
            f" architecture, among them {missing[0]}; get the whole checkpoint"
        )
    loaded_base: PreTrainedModel = base
    return loaded_base


def load_tokenizer(model: ModelConfig, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """Load the base's tokenizer; `chat_template` (Jinja, or a file that holds it) replaces its own.

    A tokenizer without a padding token pads with its end token: masks say what counts.
    """
    folder = local_folder(model, weights=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=model.trust_remote_code, local_files_only=True
        )
    except LOAD_ERRORS as error:
        raise _fault(model, "its tokenizer can't be loaded", error) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if chat_template is not None:
        tokenizer.chat_template = read_template(chat_template)
        try:
            tokenizer.apply_chat_template(TRIAL_TURNS, tokenize=False)
        except jinja2.TemplateError as error:
            raise ConfigError(
                f"data.chat_template: can't render a user's and an assistant's turn: {error}"
            ) from error
    return tokenizer


def read_template(chat_template: str) -> str:
    """Return a chat template's Jinja, from the file that holds it unless it is that.

    Raises ConfigError where it is neither.
    """
    if "{" in chat_template:
        return chat_template
    try:
        return Path(chat_template).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"data.chat_template: {chat_template!r} is neither Jinja (no brace in it)"
            f" nor a file that can be read: {error}"
        ) from error


def _fault(model: ModelConfig, what: str, error: Exception) -> ConfigError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return ConfigError(f"model.name_or_path: {model.name_or_path}: {what}: {reason}")
