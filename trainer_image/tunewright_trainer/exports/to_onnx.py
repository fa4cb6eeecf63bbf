"""ONNX: input_ids and attention_mask [texts, tokens] to logits [texts, tokens, vocabulary], all in fp32, without a cache of earlier tokens."""

import logging
from pathlib import Path
from typing import Any

import torch

from tunewright_crds.errors import FailureCode, Refusal
from tunewright_trainer.exports import PARAM

FILE = "model.onnx"


def write(network: Any, folder: Path) -> None:
    """Write ``network``, in fp32 and on the CPU, as model.onnx with its weights beside it.

    Raises `Refusal`, ModelUnsupported, with what the exporter says of a model that it cannot follow.
    """
    from transformers.exporters import OnnxConfig, OnnxExporter

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of operators of libraries that nobody asked for
    sample = torch.arange(12).reshape(2, 6) % network.config.vocab_size
    inputs = {"input_ids": sample, "attention_mask": torch.ones_like(sample)}
    cached = network.config.use_cache
    network.config.use_cache = False
    try:
        exported = OnnxExporter().export(network, inputs, config=OnnxConfig(dynamic=True))
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of many kinds, by what the exporter comes upon
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise Refusal(FailureCode.MODEL_UNSUPPORTED, f"format onnx: the exporter cannot follow this model: {said}", param=PARAM) from error
    finally:
        network.config.use_cache = cached
    exported.save_pretrained(folder)


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """What ONNX Runtime computes with the file: logits [tokens, vocabulary] of ``ids`` [1, tokens]."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(folder / FILE), options, providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"input_ids": ids.numpy(), "attention_mask": np.ones(ids.shape, np.int64)})
    return torch.from_numpy(found[0])
