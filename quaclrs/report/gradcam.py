"""Grad-CAM by captum: which parts of a spectrogram support the prediction.

Method: Selvaraju et al. 2017, "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization".
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from captum.attr import LayerAttribution, LayerGradCam
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from quaclrs.imaging.normalise import IMAGENET_MEAN, IMAGENET_STD
from quaclrs.report import plots
from quaclrs.system.atomic_files import atomic_writer
from quaclrs.training.models import gradcam_layer

CHUNK = 16
"""Images in one pass through the network: 16 at 224 pixels need about 1 GB in VGG16."""

MIN_PANEL = 224
"""Least side of a panel in pixels: smaller images are enlarged, so that the title has room."""

_GAP = 8
_FONT_SIZE = 13
_LINE_HEIGHT = 18
_RIGHT_COLOUR = "#1a7f37"
_WRONG_COLOUR = "#c0341d"
_LONGEST_FILE_STEM = 50
"""Characters of a class name kept in a file name: 50 of four bytes each stay below file systems' 255 bytes."""


def pick_samples(
    labels: npt.ArrayLike,
    predictions: npt.ArrayLike | None = None,
    is_original: npt.ArrayLike | None = None,
    per_class: int = 5,
) -> npt.NDArray[np.int64]:
    """Pick up to ``per_class`` samples of each class; returns their positions, by class. Deterministic.

    ``labels``, ``predictions`` (N,) int and ``is_original`` (N,) bool. Within a class: originals before augmented
    copies, then right and wrong predictions alternate, then in the given order.
    """
    truth = np.asarray(labels, dtype=np.int64)
    wrong = np.zeros(len(truth), bool) if predictions is None else np.asarray(predictions) != truth
    copy = np.zeros(len(truth), bool) if is_original is None else ~np.asarray(is_original, dtype=bool)
    turn = np.zeros(len(truth), np.int64)  # position of a sample among those of its class, kind and outcome
    for label in np.unique(truth):
        for kind in (0, 1, 2, 3):
            members = np.flatnonzero((truth == label) & (2 * copy + wrong == kind))
            turn[members] = np.arange(len(members))
    order = np.lexsort((wrong, turn, copy, truth))  # the last key counts first
    classes, starts = np.unique(truth[order], return_index=True)
    rank = np.arange(len(order)) - starts[np.searchsorted(classes, truth[order])]
    return order[rank < per_class].astype(np.int64)


def heat_maps(model: nn.Module, name: str, images: torch.Tensor, targets: torch.Tensor) -> npt.NDArray[np.float32]:
    """Grad-CAM of ``targets`` (B,) int64 for ``images`` (B, 3, S, S), normalised and on ``model``'s device.

    Returns (B, S, S) float32 on the CPU, each map scaled to a maximum of 1; a map without any positive value is 0
    everywhere. ``model`` is an instance of the architecture ``name``, not wrapped in DDP or torch.compile. It runs in
    evaluation mode; its training flags, ``requires_grad``, gradients and hooks are restored.
    """
    if len(images) == 0:
        return np.zeros((0, *images.shape[2:]), np.float32)
    with torch.inference_mode(False), torch.enable_grad(), _frozen_for_evaluation(model):
        explainer = LayerGradCam(model, gradcam_layer(model, name))
        chunks = zip(torch.split(images, CHUNK), torch.split(targets, CHUNK), strict=True)
        heat = torch.cat([_attribute(explainer, chunk, target) for chunk, target in chunks])
    peak = heat.amax(dim=(1, 2), keepdim=True)
    return (heat / peak.clamp_min(torch.finfo(heat.dtype).tiny)).cpu().numpy()


def write_gradcams(
    model: nn.Module,
    name: str,
    images: torch.Tensor,
    labels: npt.ArrayLike,
    predictions: npt.ArrayLike,
    class_names: Sequence[str],
    directory: Path,
    pixels: npt.NDArray[np.uint8] | None = None,
) -> list[Path]:
    """Write ``gradcam_{class}_{i}.png`` into ``directory`` for each image: the image beside its heat map.

    ``images`` (B, 3, S, S) normalised, on ``model``'s device; ``labels`` and ``predictions`` (B,) int; ``pixels``
    (B, S, S, 3) uint8 RGB, by default computed back from ``images``. The map explains the prediction. In the file name,
    ``class`` is the label and ``i`` counts that class's images from 0; characters that file systems refuse become
    ``_``. Returns the paths, in the images' order. Raises :class:`StorageError` naming the file that cannot be written.
    """
    truth, predicted = np.asarray(labels, dtype=np.int64), np.asarray(predictions, dtype=np.int64)
    shown = to_pixels(images) if pixels is None else pixels
    heat = heat_maps(model, name, images, torch.as_tensor(predicted, device=images.device))
    stems = safe_file_stems(class_names)
    counts = dict.fromkeys(range(len(class_names)), 0)
    paths = []
    for image, warmth, label, guess in zip(shown, heat, truth.tolist(), predicted.tolist(), strict=True):
        path = directory / f"gradcam_{stems[label]}_{counts[label]}.png"
        counts[label] += 1
        drawing = _draw(image, warmth, class_names[label], class_names[guess])
        with atomic_writer(path) as file:
            drawing.save(file, format="png")
        paths.append(path)
    return paths


def to_pixels(images: torch.Tensor) -> npt.NDArray[np.uint8]:
    """The 8-bit RGB images (B, S, S, 3) from which normalised ``images`` (B, 3, S, S) were made; exact for float32."""
    mean = torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD).view(3, 1, 1)
    levels = (images.detach().float().cpu() * std + mean) * 255
    return levels.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def safe_file_stems(class_names: Sequence[str]) -> list[str]:
    """Make a file name stem per class from letters, digits, ``_``, ``-`` and ``.``; all differ, ignoring case."""
    stems: list[str] = []
    taken: set[str] = set()
    for label, class_name in enumerate(class_names):
        stem = re.sub(r"[^\w.-]+", "_", class_name).lstrip(".")[:_LONGEST_FILE_STEM] or "class"
        while stem.casefold() in taken:
            stem = f"{stem}-{label}"
        taken.add(stem.casefold())
        stems.append(stem)
    return stems


@contextmanager
def _frozen_for_evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode with frozen parameters, undone after the block.

    With frozen parameters autograd keeps no activations before the explained layer: captum makes that layer's output
    the graph's only leaf. So models with and without frozen features take the same path.
    """
    was_training = [(module, module.training) for module in model.modules()]
    did_require = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval().requires_grad_(False)
        yield
    finally:
        for module, training in was_training:
            module.training = training
        for parameter, requires_grad in did_require:
            parameter.requires_grad_(requires_grad)


def _attribute(explainer: LayerGradCam, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Grad-CAM of one chunk: (b, S, S) float32, not negative."""
    # copied, since autograd refuses tensors made in inference mode
    inputs = images.detach().to(torch.float32, copy=True)
    cam = explainer.attribute(inputs, target=targets.clone(), relu_attributions=True)  # (b, 1, rows, columns)
    heat: torch.Tensor = LayerAttribution.interpolate(cam.detach(), tuple(images.shape[2:]), "bilinear")[:, 0]
    return heat


def _draw(image: npt.NDArray[np.uint8], heat: npt.NDArray[np.float32], true: str, predicted: str) -> Image.Image:
    """Draw the image (S, S, 3) and, to its right, the same overlaid with ``heat`` (S, S), below the two class names."""
    colours = plots.heat_colours()[(heat * 255).round().astype(np.uint8)]  # (S, S, 3) uint8
    opacity = 0.25 + 0.45 * heat[..., np.newaxis]  # regions of low heat stay readable
    overlay = (image * (1 - opacity) + colours * opacity).round().astype(np.uint8)
    panels = [_enlarge(Image.fromarray(panel)) for panel in (np.ascontiguousarray(image), overlay)]
    width, height = panels[0].size
    top = 2 * _LINE_HEIGHT + _GAP
    canvas = Image.new("RGB", (2 * width + 3 * _GAP, top + height + _GAP), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.truetype(plots.font_path(), _FONT_SIZE)
    outcome_colour = _RIGHT_COLOUR if true == predicted else _WRONG_COLOUR
    for number, (line, colour) in enumerate(((f"true: {true}", "black"), (f"predicted: {predicted}", outcome_colour))):
        pen.text((_GAP, _GAP // 2 + number * _LINE_HEIGHT), " ".join(line.split()), font=font, fill=colour)
    canvas.paste(panels[0], (_GAP, top))
    canvas.paste(panels[1], (2 * _GAP + width, top))
    return canvas


def _enlarge(panel: Image.Image) -> Image.Image:
    """Enlarge ``panel`` by a whole factor to at least MIN_PANEL pixels."""
    factor = -(-MIN_PANEL // panel.width)
    return (
        panel if factor == 1 else panel.resize((factor * panel.width, factor * panel.height), Image.Resampling.NEAREST)
    )
