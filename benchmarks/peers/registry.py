"""The list of all peers and how each is started: one entry is one row of the benchmark."""

from __future__ import annotations

from dataclasses import dataclass

DECODING, READY = "decoding", "nothing to decode"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One peer in one of its variants."""

    key: str
    """Its name for ``--only``."""
    name: str
    """The name of its row: the project and what it reads."""
    script: str
    """A file in this folder. Its docstring says which options were chosen and what is checked."""
    group: str
    """DECODING: images are decoded while loading. READY: pixels of the final size are stored."""
    arguments: tuple[str, ...] = ()
    environment: str | None = None
    """Its own environment, from ``requirements-{environment}.txt``; None if ours has all it needs."""
    over_ours: bool = True
    """Whether packages that its environment lacks come from ours."""
    least_workers: int = 0
    dtypes: tuple[str, ...] = ("float32", "uint8")
    waits_passively: bool = True
    """Whether it runs with OMP_WAIT_POLICY=passive: torch's threads then sleep while they wait for one another. By
    default they spin, and compete for the cores with other processes and the peer's own workers. Measured in turn on 2
    shared cores, spinning and sleeping: LitData with 0 workers 212 to 2,473 and 7,535 to 9,073 images/s; a memory map
    into one buffer 5,806 and 10,658. FFCV has its own threads, gains nothing (6,335 and 6,204) and keeps the default.
    """


PEERS = (
    Entry(key="dali", name="bare DALI, its own reader", script="dali_reader.py", group=DECODING, least_workers=1),
    Entry(key="pillow", name="Pillow + DataLoader, PNG tree", script="pillow_files.py", group=DECODING),
    Entry(
        key="torchvision",
        name="torchvision decode_image + DataLoader, PNG tree",
        script="torchvision_files.py",
        group=DECODING,
    ),
    Entry(key="webdataset", name="webdataset, png shards", script="webdataset_png.py", group=DECODING),
    Entry(
        key="litdata-png",
        name="LitData, PNG bytes",
        script="litdata_store.py",
        group=DECODING,
        arguments=("--stored", "png"),
        environment="litdata-datasets",
    ),
    Entry(
        key="streaming-png",
        name="MosaicML Streaming, PNG bytes",
        script="streaming_store.py",
        group=DECODING,
        arguments=("--stored", "png"),
        environment="streaming",
    ),
    Entry(
        key="datasets-png",
        name="Hugging Face datasets, PNG bytes",
        script="hf_datasets.py",
        group=DECODING,
        arguments=("--stored", "png"),
        environment="litdata-datasets",
    ),
    Entry(
        key="ffcv-jpeg",
        name="FFCV, JPEG of the size asked for (lossy)",
        script="ffcv_store.py",
        group=DECODING,
        arguments=("--stored", "jpeg"),
        environment="ffcv",
        over_ours=False,
        waits_passively=False,
        least_workers=1,
    ),
    Entry(
        key="ffcv-raw",
        name="FFCV, raw",
        script="ffcv_store.py",
        group=READY,
        arguments=("--stored", "raw"),
        environment="ffcv",
        over_ours=False,
        waits_passively=False,
        least_workers=1,
    ),
    Entry(key="memmap", name="memory map + torch", script="memmap_torch.py", group=READY, least_workers=1),
    Entry(
        key="memmap-kept",
        name="memory map + torch, one buffer",
        script="memmap_torch.py",
        group=READY,
        arguments=("--keep_buffer",),
        least_workers=1,
        dtypes=("float32",),  # uint8 has no buffer to keep
    ),
    Entry(
        key="litdata-raw",
        name="LitData, ready pixels",
        script="litdata_store.py",
        group=READY,
        arguments=("--stored", "raw"),
        environment="litdata-datasets",
    ),
    Entry(
        key="streaming-raw",
        name="MosaicML Streaming, ready pixels",
        script="streaming_store.py",
        group=READY,
        arguments=("--stored", "raw"),
        environment="streaming",
    ),
    Entry(
        key="datasets-raw",
        name="Hugging Face datasets, ready pixels",
        script="hf_datasets.py",
        group=READY,
        arguments=("--stored", "raw"),
        environment="litdata-datasets",
    ),
)
KEYS = tuple(entry.key for entry in PEERS)
