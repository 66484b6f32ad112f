"""The base of a run, with the slices that it trains: as the parent's, as before, or newly chosen.

Invariant: all workers convert by one selection, and it is the same for any number of them and any
layout. It is kept in the run folder, so that a run that goes on elsewhere, with other rounding,
still trains the slices that its checkpoints hold.
"""

import gc
import logging

import torch
import torch.distributed as dist
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from s2ft_ray.bases import load_base_model
from s2ft_ray.config import RunConfig
from s2ft_ray.data import PreparedData, calibration_batches
from s2ft_ray.method import (
    Adapter,
    Selection,
    SharedCalibration,
    choose,
    convert,
    convert_like,
    convert_with,
    looks_at_data,
)
from s2ft_ray.training.faults import raised_everywhere
from s2ft_ray.training.parallel import Layout, Workers, shard_model
from s2ft_ray.training.run_folder import SELECTION, RunFolder

logger = logging.getLogger(__name__)


def load_converted(
    run: RunFolder,
    config: RunConfig,
    data: PreparedData,
    tokenizer: PreTrainedTokenizerBase,
    workers: Workers,
    layout: Layout,
) -> PreTrainedModel:
    """Load the base and convert it, ready for ``shard_model``. A collective.

    Where the base is sharded, a selection that looks at data is made on a sharded base too, which
    is let go of before the one that is trained is loaded.
    """
    # One answer for all: a worker that looks late would find what the first has just written,
    # and convert its layers in another order than the others.
    found = [run.read_json(SELECTION)]
    dist.broadcast_object_list(found)
    selection = None if found[0] is None else Selection.from_json(found[0])
    with raised_everywhere():
        parent = Adapter.load(run.parent) if run.parent.exists() else None
        avoid = [Adapter.load(folder) for folder in sorted(run.avoided.glob("*"))]
        measures = parent is None and selection is None and looks_at_data(config.method)
        calibration = _calibration(config, data, tokenizer) if measures else None
    if calibration and layout.group > 1 and not avoid:  # which are held against a whole base
        selection = _choose_sharded(config, calibration, workers, layout)
    with raised_everywhere():
        model = load_base_model(config.model, mapped=layout.group > 1)
    if layout.sharding == "replicate":
        model.to(workers.device)  # it fits whole: a selection that looks at data is made there
    if parent:
        selection = convert_like(model, parent)
    elif selection:
        convert_with(model, config.method, selection)
    else:
        selection = convert(model, config.method, calibration, avoid)
    if found[0] is None:
        with raised_everywhere():
            if workers.rank == 0:
                run.write_json(SELECTION, selection.to_json())
    return model


def _calibration(
    config: RunConfig, data: PreparedData, tokenizer: PreTrainedTokenizerBase
) -> SharedCalibration:
    # Row by row where each has a gradient: none cancels another's, and the graph, which keeps
    # what training never does, is as small as can be.
    is_forward = config.method.selection != "gradient"
    batches = calibration_batches(
        data.train,
        config.data.calibration_share,
        config.optim.micro_batch_size if is_forward else 1,
        tokenizer.pad_token_id,
    )
    return SharedCalibration(batches)


def _choose_sharded(
    config: RunConfig, calibration: SharedCalibration, workers: Workers, layout: Layout
) -> Selection:
    """Measure the plain base as the workers will hold it, on their devices, and leave nothing."""
    with raised_everywhere():
        model = load_base_model(config.model, mapped=True)
    model.requires_grad_(False)
    shard_model(model, workers, layout)
    if workers.rank == 0:
        logger.info("the selection by %s is made on the sharded base", config.method.selection)
    selection = choose(model, config.method, calibration)
    del model
    gc.collect()  # modules and FSDP's hooks hold each other
    if workers.device.type == "cuda":
        torch.cuda.empty_cache()
    return selection
