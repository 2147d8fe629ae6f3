"""Explorers: turn a knob and see a measured number move. Where widgets do not run, they are figures.

    explore_transfer()    chapter 02: labels per class and strategy against accuracy; kept results of `recordings.transfer`
    explore_freezing()    chapter 04: what trains, what it takes, and accuracy; kept results of `recordings.strategies`
    explore_drift()       chapter 05: other images, what each BatchNorm sees, and accuracy; measured when a knob is turned
    explore_lora()        chapter 06: rank, layers and optimizer against memory; counted, beside recorded accuracy
    explore_export()      chapter 08: formats by size, latency and what they need; kept results of `recordings.formats`

Put one on the last line of a cell.
"""

from helpers.explorers.widgets import (
    DriftExplorer,
    Explorer,
    ExportExplorer,
    FreezingExplorer,
    LoraExplorer,
    StaticFigure,
    TransferExplorer,
    explore,
)


def explore_transfer() -> Explorer | StaticFigure:
    """Labels per class and strategy against accuracy, on digits and docstrings."""
    return explore(TransferExplorer)


def explore_freezing() -> Explorer | StaticFigure:
    """How many stages train: parameters and memory beside the recorded accuracy, of glyphnet and of MiniLM."""
    return explore(FreezingExplorer)


def explore_drift() -> Explorer | StaticFigure:
    """Digits on grey paper, in dim ink, inverted ...: the drift of each BatchNorm, and accuracy with both statistics."""
    return explore(DriftExplorer)


def explore_lora() -> Explorer | StaticFigure:
    """Rank, layers, optimizer and precision: memory, what trains, and the recorded accuracy, of MiniLM and of glyphnet."""
    return explore(LoraExplorer)


def explore_export() -> Explorer | StaticFigure:
    """Formats of three models by size, latency and what has to be there where they run."""
    return explore(ExportExplorer)
