"""Training data: files of rows become tokens with targets, and a stream of batches.

    location -> files -> source, tables -> formats -> chat, encoding
             -> validation -> cache -> prepared                        on the driver
    loader -> packing, batches                                         on each worker

A row's tokens and its ``target_mask`` stay together; everything else is derived from them.
"""

from s2ft_ray.data.batches import IGNORE_INDEX, MicroBatch
from s2ft_ray.data.formats import Prompt, encode_prompt, render_prompt
from s2ft_ray.data.loader import (
    Step,
    TrainLoader,
    calibration_batches,
    eval_batches,
    num_sequences,
    num_steps,
)
from s2ft_ray.data.location import absolute_name
from s2ft_ray.data.packing import pack_rows, packing_efficiency
from s2ft_ray.data.prepared import DataReport, EvalPrompt, PreparedData, prepare_data
from s2ft_ray.data.preview import preview

__all__ = [
    "IGNORE_INDEX",
    "DataReport",
    "EvalPrompt",
    "MicroBatch",
    "PreparedData",
    "Prompt",
    "Step",
    "TrainLoader",
    "absolute_name",
    "calibration_batches",
    "encode_prompt",
    "eval_batches",
    "num_sequences",
    "num_steps",
    "pack_rows",
    "packing_efficiency",
    "prepare_data",
    "preview",
    "render_prompt",
]
