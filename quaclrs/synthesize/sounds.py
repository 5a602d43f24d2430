"""Synthetic sounds, one formula per class, as mel spectrograms in decibels. A sample and a seed determine every value.

No audio is generated. Each class is a formula for the level at (frequency, time) whose parameters are drawn once per
recording. A grid is the maximum of the class's sound, sometimes another class in the background, and a noise floor;
then texture, silence after the recording's end and the augmentation are added. Each of these has its own random stream,
so that augmented copies share everything but the augmentation.

Frequencies ``f`` (rows, 1) are in Hz, times ``t`` (cols,) in seconds, levels in decibels relative to the loudest part
of the sound.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from quaclrs.synthesize.plan import CLASSES, Sample

Array = NDArray[np.float64]
Rng = np.random.Generator

ROWS = 128
CLIP_S = 4.0
_FRAME_S = 512 / 48_000  # hop length over sample rate
_COLUMNS = {"ts0": 469, "ts1": 313}
_RATES = {"ts0": 0.8, "ts1": 1.2}
_SEMITONES = {"ps0": -2, "ps1": 2}
_ADDED_NOISE_DB = {"n0": -27.0, "n1": -37.0}
_ORIGINAL_COLUMNS = 376
_TOP_DB = 80.0
_SILENCE_DB = -200.0
_GRAIN_DB = 0.8

_SOUND, _SCENE, _TEXTURE, _AUGMENTATION = range(4)
"""The independent random streams of a recording."""


def mel_grid(sample: Sample, seed: int) -> Array:
    """(128, 376 | 469 | 313) float64 decibels: 0 at the loudest cell, at least -80, row 0 the lowest band.

    Augmented copies of one recording share its sound and its noise. Masks are applied last and may hide the loudest
    cell.
    """
    cols = _COLUMNS.get(sample.tag, _ORIGINAL_COLUMNS)
    time = np.arange(cols, dtype=np.float64) * (_FRAME_S * _RATES.get(sample.tag, 1.0))
    pitch = 2.0 ** (_SEMITONES.get(sample.tag, 0) / 12)
    scene = _stream(sample, seed, _SCENE)
    level: Array = _sound(sample, seed, scene, _band_centres(pitch), time)
    level = np.maximum(level, _floor(scene))
    level += _texture(_stream(sample, seed, _TEXTURE), cols)
    level[:, time > _end_s(scene, sample)] = _SILENCE_DB
    augmentation = _stream(sample, seed, _AUGMENTATION, *sample.tag.encode())
    if sample.tag in _ADDED_NOISE_DB:
        level = np.maximum(level, _ADDED_NOISE_DB[sample.tag] + level.max() + _texture(augmentation, cols))
    level -= level.max()
    np.maximum(level, -_TOP_DB, out=level)
    _mask(level, sample.tag, augmentation)
    return level


def _stream(sample: Sample, seed: int, *purpose: int) -> Rng:
    """The random stream of the sample's recording for one ``purpose``."""
    entropy = (seed, sample.class_id, sample.fold, sample.recording, *purpose)
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))


def _band_centres(pitch: float) -> Array:
    """(128, 1) Hz: the centres of the mel bands from 20 to 8000 Hz, divided by the pitch-shift factor ``pitch``."""
    edges = 2595 * np.log10(1 + np.array([20.0, 8000.0]) / 700)
    mel = np.linspace(edges[0], edges[1], ROWS + 2)[1:-1]
    centres: Array = (700 * (10 ** (mel / 2595) - 1) / pitch)[:, None]
    return centres


# --- everything around the sound ---


def _sound(sample: Sample, seed: int, scene: Rng, f: Array, t: Array) -> Array:
    """(rows, cols): the class's sound with a random spectral tilt, in a fifth of the recordings over another class."""
    level = _SOUNDS[CLASSES[sample.class_id]](_stream(sample, seed, _SOUND), f, t)
    level = level + scene.uniform(-2, 2) * np.log2(f / 1000)
    other = int(scene.integers(len(CLASSES)))
    loudness_db = scene.uniform(-30, -14)
    if scene.random() < 0.2:
        level = np.maximum(level, loudness_db + _SOUNDS[CLASSES[other]](scene.spawn(1)[0], f, t))
    return level


def _floor(scene: Rng) -> Array:
    """(rows, 1): the noise floor, falling or rising with frequency."""
    slope: Array = np.linspace(0, 1, ROWS)[:, None]
    return scene.uniform(-58, -40) + scene.uniform(-14, 4) * slope


def _texture(rng: Rng, cols: int) -> Array:
    """(rows, cols): the grain of a noisy spectrogram, correlated along time because neighbouring frames overlap."""
    grain = rng.standard_normal((ROWS, cols + 1), dtype=np.float32)
    return _GRAIN_DB * (grain[:, 1:] + grain[:, :-1]).astype(np.float64)


def _end_s(scene: Rng, sample: Sample) -> float:
    """When the recording ends, in seconds. What follows is padding of exact silence."""
    often = CLASSES[sample.class_id] in ("car_horn", "dog_bark", "gun_shot")
    short = scene.random() < (0.3 if often else 0.1)
    return float(scene.uniform(2.4, 3.9)) if short else CLIP_S


def _mask(level: Array, tag: str, rng: Rng) -> None:
    """Set SpecAugment's bands or PatchAugment's rectangles to the grid's minimum, in place."""
    rows, cols = level.shape
    quiet = level.min()
    if tag.startswith("sa"):
        for _ in range(int(tag[2:]) + 1):
            row, col = rng.integers(rows - 16), rng.integers(cols - 40)
            level[row : row + rng.integers(4, 17)] = quiet
            level[:, col : col + rng.integers(8, 41)] = quiet
    elif tag.startswith("pa"):
        for _ in range(3 + 2 * int(tag[2:])):
            row, col = rng.integers(rows - 32), rng.integers(cols - 48)
            level[row : row + rng.integers(8, 33), col : col + rng.integers(12, 49)] = quiet


# --- building blocks of sounds ---


def _comb(f: Array, pitch_hz: Array | float, decay_db: float) -> Array:
    """(rows, cols): the harmonics of a pitch that may vary over time, each ``decay_db`` softer than the one below."""
    pitch = np.atleast_1d(pitch_hz)
    position = f / pitch
    harmonic = np.maximum(np.rint(position), 1)
    distance = (position - harmonic) * (pitch / (25 + 0.02 * f))  # in band widths
    comb: Array = -6 * np.minimum(distance**2, 12) - decay_db * (harmonic - 1)
    return comb


def _band(f: Array, centre_hz: float, octaves: float) -> Array:
    """(rows, 1): a noise band around a centre, 6 dB down at ``octaves`` to either side."""
    band: Array = -6 * (np.log2(f / centre_hz) / octaves) ** 2
    return band


def _bursts(t: Array, starts: Array, lengths: Array, fade_db_per_s: float) -> Array:
    """(cols,): bursts of 0 dB at each start that fade until they end, and silence outside."""
    since = t - starts[:, None]  # (bursts, cols)
    inside = (since >= 0) & (since < lengths[:, None])
    bursts: Array = np.where(inside, -fade_db_per_s * since, _SILENCE_DB).max(axis=0)
    return bursts


def _random_starts(rng: Rng, count: int) -> Array:
    """(count,) ascending start times, spread over the clip with random offsets."""
    return (np.arange(count) + rng.uniform(0, 0.6, count)) * (CLIP_S / count)


def _value_at(t: Array, starts: Array, values: Array) -> Array:
    """(cols,): at each time, the value that belongs to the latest start."""
    current: Array = values[np.maximum(np.searchsorted(starts, t, side="right") - 1, 0)]
    return current


# --- the classes ---


def _air_conditioner(rng: Rng, f: Array, t: Array) -> Array:
    hum = _comb(f, rng.uniform(90, 240), rng.uniform(3, 6))
    flutter = rng.uniform(0, 2) * np.sin(2 * np.pi * rng.uniform(0.3, 1.5) * t)
    return np.maximum(hum - rng.uniform(0, 5), _band(f, rng.uniform(500, 1000), rng.uniform(1.2, 1.8)) - 8 + flutter)


def _ambulance(rng: Rng, f: Array, t: Array) -> Array:
    low, ratio = rng.uniform(420, 600), rng.uniform(1.28, 1.45)
    cycle = t / rng.uniform(0.8, 1.6) + rng.random()
    return _comb(f, np.where(cycle % 1 < 0.5, low, low * ratio), rng.uniform(2, 5))


def _car_horn(rng: Rng, f: Array, t: Array) -> Array:
    pitch, decay = rng.uniform(300, 520), rng.uniform(1, 3)
    chord = np.maximum(_comb(f, pitch, decay), _comb(f, pitch * rng.uniform(1.18, 1.28), decay) - 2)
    count = int(rng.integers(1, 5))
    return chord + _bursts(t, _random_starts(rng, count), rng.uniform(0.3, 0.9, count) * 4 / (count + 1), 2)


def _children_playing(rng: Rng, f: Array, t: Array) -> Array:
    count = int(rng.integers(6, 13))
    starts, pitches, glides = _random_starts(rng, count), rng.uniform(320, 850, count), rng.uniform(-0.8, 0.8, count)
    pitch = _value_at(t, starts, pitches) * 2 ** (_value_at(t, starts, glides) * (t - _value_at(t, starts, starts)))
    voice = _comb(f, pitch, rng.uniform(2, 4)) + 0.5 * _band(f, rng.uniform(1200, 2500), 1.5)
    babble = _band(f, rng.uniform(700, 1500), 1.2) - rng.uniform(18, 28)
    return np.maximum(voice + _bursts(t, starts, rng.uniform(0.12, 0.4, count), 20), babble)


def _dog_bark(rng: Rng, f: Array, t: Array) -> Array:
    count = int(rng.integers(3, 8))
    starts, pitch = _random_starts(rng, count), rng.uniform(300, 700)
    since = np.clip(t - _value_at(t, starts, starts), 0, 0.4)
    bark = np.maximum(_comb(f, pitch * 2 ** (-1.5 * since), 2.5), _band(f, 2.5 * pitch, 1) - 8)
    return bark + _bursts(t, starts, rng.uniform(0.12, 0.3, count), rng.uniform(50, 110))


def _drilling(rng: Rng, f: Array, t: Array) -> Array:
    pitch = rng.uniform(150, 420) * (1 + 0.03 * np.sin(2 * np.pi * rng.uniform(0.2, 0.8) * t))
    whine = _comb(f, pitch, rng.uniform(0.3, 1)) - 3
    grind = _band(f, rng.uniform(2500, 5500), rng.uniform(0.8, 1.4)) - rng.uniform(0, 8)
    return np.maximum(whine, grind) + _bursts(t, np.array([rng.uniform(-1.5, 0.6)]), np.array([rng.uniform(3, 6)]), 0)


def _engine_idling(rng: Rng, f: Array, t: Array) -> Array:
    beat = rng.uniform(3, 8) * np.sin(2 * np.pi * rng.uniform(5, 11) * t)
    rumble = np.maximum(_comb(f, rng.uniform(50, 110), rng.uniform(1.5, 3)), _band(f, rng.uniform(80, 180), 1.2) - 4)
    return rumble + beat


def _firetruck(rng: Rng, f: Array, t: Array) -> Array:
    swing = np.sin(2 * np.pi * (t / rng.uniform(2.6, 5.5) + rng.random()))
    return _comb(f, rng.uniform(550, 900) * 2 ** (rng.uniform(0.4, 0.8) * swing), rng.uniform(2, 5))


def _gun_shot(rng: Rng, f: Array, t: Array) -> Array:
    count = int(rng.choice([1, 1, 1, 2, 3]))
    starts = _random_starts(rng, count) * rng.uniform(0.2, 0.9)
    fade = _bursts(t, starts, np.full(count, CLIP_S), rng.uniform(25, 70))
    return _band(f, rng.uniform(200, 900), rng.uniform(1.8, 2.8)) + fade * (0.6 + 0.1 * np.log2(f / 100))


def _jackhammer(rng: Rng, f: Array, t: Array) -> Array:
    rate = rng.uniform(3.5, 7)
    starts = np.arange(-1, CLIP_S * rate) / rate + rng.uniform(0, 1 / rate)
    blows = _bursts(t, starts, np.full(len(starts), 1 / rate), rng.uniform(14, 28) * rate)
    return _band(f, rng.uniform(700, 2500), rng.uniform(1.4, 2.4)) + blows


def _police(rng: Rng, f: Array, t: Array) -> Array:
    cycle = (t / rng.uniform(0.25, 0.6) + rng.random()) % 1
    swing = np.abs(2 * cycle - 1) if rng.random() < 0.5 else cycle  # a triangle or a sawtooth
    return _comb(f, rng.uniform(480, 800) * 2 ** (rng.uniform(0.7, 1.3) * swing), rng.uniform(2, 5))


def _street_music(rng: Rng, f: Array, t: Array) -> Array:
    beat = rng.uniform(0.22, 0.5)
    starts = np.arange(0, CLIP_S, beat)
    root, steps = rng.uniform(160, 330), np.array([0, 2, 4, 5, 7, 9, 12])
    melody, bass = rng.choice(steps, len(starts)), rng.choice(steps, len(starts)) - 12
    fade = _bursts(t, starts, np.full(len(starts), beat), rng.uniform(10, 40))
    voices = np.maximum(
        _comb(f, root * 2 ** (_value_at(t, starts, melody) / 12), rng.uniform(2, 4)),
        _comb(f, root * 2 ** (_value_at(t, starts, bass) / 12), 4) - 3,
    )
    hits = starts[:: int(rng.integers(1, 3))]
    drum = _band(f, 5000, 1.5) - 10 + _bursts(t, hits, np.full(len(hits), 0.12), 80)
    music: Array = np.maximum(voices + fade, drum)
    return music


def _traffic(rng: Rng, f: Array, t: Array) -> Array:
    count = int(rng.integers(1, 4))
    passes = ((t - _random_starts(rng, count)[:, None]) / rng.uniform(0.3, 0.6, count)[:, None]) ** 2
    swell = -4 * passes.min(axis=0)
    near = _band(f, rng.uniform(600, 1300), rng.uniform(1.3, 2)) + np.maximum(swell, -30)
    far = _band(f, rng.uniform(90, 250), 1) - rng.uniform(6, 14)
    traffic: Array = np.maximum(near, far)
    return traffic


_SOUNDS: dict[str, Callable[[Rng, Array, Array], Array]] = {
    "air_conditioner": _air_conditioner,
    "ambulance": _ambulance,
    "car_horn": _car_horn,
    "children_playing": _children_playing,
    "dog_bark": _dog_bark,
    "drilling": _drilling,
    "engine_idling": _engine_idling,
    "firetruck": _firetruck,
    "gun_shot": _gun_shot,
    "jackhammer": _jackhammer,
    "police": _police,
    "street_music": _street_music,
    "traffic": _traffic,
}
