"""Builds the models of training/architectures.py.

Constructors and ImageNet weights are torchvision's. As in the original trainer, the last ``Linear`` is replaced by a
fresh one with the dataset's number of classes.
"""

from __future__ import annotations

import contextlib
import errno
import pickle
import socket
import sys
from collections.abc import Iterator, Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError

import torch
from torch import nn
from torchvision import models

from quaclrs.errors import MissingDependencyError, QuaclrsError
from quaclrs.system.atomic_files import storage_error
from quaclrs.training.architectures import Architecture, architecture

AUX_LOSS_WEIGHT = 0.4
"""Weight of InceptionV3's auxiliary loss in training, as in the original trainer."""

DOWNLOAD_TIMEOUT_S = 30.0
"""Longest wait for the weights' server in seconds. torch.hub sets no timeout, and a network that drops packets would
stall for minutes.
"""


def gradcam_layer(model: nn.Module, name: str) -> nn.Module:
    """The module of ``model``, an instance of the architecture ``name``, whose output Grad-CAM explains."""
    return model.get_submodule(architecture(name).gradcam_layer)


def build_model(name: str, num_classes: int, *, pretrained: bool = False, freeze_features: bool = False) -> nn.Module:
    """A model of the architecture ``name`` on the CPU, in training mode, channels_last.

    Random weights come from torch's global generator: seed it before. ``pretrained`` loads ImageNet weights for all but
    the heads. ``freeze_features`` leaves only the row's ``trainable`` modules with gradients; BatchNorm's running
    statistics still follow the data in training mode, as in the original trainer.

    Raises :class:`UsageError` for an unknown name; :class:`MissingDependencyError`, naming the file to provide, for
    weights that are not on disk and cannot be downloaded; :class:`StorageError` when they cannot be stored.
    """
    row = architecture(name)
    model = _load_pretrained(name) if pretrained else _construct(row, row.options)
    for head in row.heads:
        old = model.get_submodule(head)
        assert isinstance(old, nn.Linear), f"{name}: the head {head} must be a Linear, and is a {type(old).__name__}"
        model.set_submodule(head, nn.Linear(old.in_features, num_classes))
    if freeze_features:
        _freeze_all_but(model, row.trainable)
    return model.train().to(memory_format=torch.channels_last)


def forward_logits(model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Class scores (B, classes) for ``images`` (B, 3, S, S), and the auxiliary head's or None.

    Only InceptionV3 in training mode has auxiliary scores; the loss to minimise is
    ``loss(logits) + AUX_LOSS_WEIGHT * loss(aux_logits)``.
    """
    output = model(images)
    if isinstance(output, tuple):  # InceptionOutputs, which DDP and torch.compile may turn into a plain tuple
        logits, aux_logits = output
        return logits, aux_logits
    return output, None


def _construct(row: Architecture, options: Mapping[str, Any]) -> nn.Module:
    constructor = models.get_model_builder(row.constructor) if isinstance(row.constructor, str) else row.constructor
    model: nn.Module = constructor(weights=None, **options)
    return model


def _freeze_all_but(model: nn.Module, trainable: tuple[str, ...]) -> None:
    model.requires_grad_(False)
    for module in trainable:
        model.get_submodule(module).requires_grad_(True)


def _load_pretrained(name: str) -> nn.Module:
    """The architecture ``name`` with its ImageNet weights, 1000-way heads included."""
    row = architecture(name)
    with torch.device("meta"):  # these weights are about to be replaced: take no memory and no random numbers
        model = _construct(row, row.pretrained_options)
    path = weights_path(name)
    try:
        with _network_deadline(), contextlib.redirect_stdout(sys.stderr):  # torch.hub announces its download on stdout
            state = models.get_weight(row.weights).get_state_dict(
                progress=sys.stderr.isatty(), check_hash=True, weights_only=True, map_location="cpu"
            )
        model.load_state_dict(state, assign=True)
    except Exception as error:  # a damaged file makes the unpickler raise nearly anything
        raise _weights_error(name, path, error) from error
    return model


def weights_path(name: str) -> Path:
    """The file in torch.hub's cache that holds the ImageNet weights of the architecture ``name``."""
    return Path(torch.hub.get_dir(), "checkpoints", Path(_weights_url(name)).name)


def _weights_url(name: str) -> str:
    return str(models.get_weight(architecture(name).weights).url)


@contextlib.contextmanager
def _network_deadline() -> Iterator[None]:
    """Bound each wait for the network within the block; torch.hub sets no timeout."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _weights_error(name: str, path: Path, error: Exception) -> QuaclrsError:
    """The error to raise: the file is damaged, the disk refused it, or it could not be downloaded."""
    url = _weights_url(name)
    if path.exists():  # torch.hub renames a download only once it is complete
        return MissingDependencyError(
            f"{path} does not hold the weights of {name} ({_short_reason(error)}); delete it, or replace it with {url}"
        )
    if isinstance(error, OSError) and _is_disk_error(error):
        return storage_error(path, error)
    return MissingDependencyError(
        f"cannot fetch {url} ({_short_reason(error)}); download it elsewhere and put it at {path}, or train without "
        "--pretrained"
    )


def _is_disk_error(error: OSError) -> bool:
    """Whether ``error`` comes from writing the file, not from the network (URLError is an OSError too)."""
    if isinstance(error, URLError):
        return False
    return error.filename is not None or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


def _short_reason(error: BaseException) -> str:
    """``error`` in a few words on one line."""
    if isinstance(error, HTTPError):
        return f"HTTP {error.code} {error.reason}"
    if isinstance(error, URLError) and isinstance(error.reason, BaseException):
        return _short_reason(error.reason)
    if isinstance(error, TimeoutError):
        return f"no answer for {DOWNLOAD_TIMEOUT_S:.0f} s"
    if isinstance(error, pickle.UnpicklingError):  # torch's own text is a page about weights_only
        return "not a file of tensors"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, HTTPException):
        return f"the connection broke: {type(error).__name__}"
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(" :.")[:120] if lines else type(error).__name__
