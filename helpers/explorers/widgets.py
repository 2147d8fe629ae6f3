"""The controls of each explorer, as widgets; without ipywidgets, the figures of their examples."""

import threading
from collections.abc import Callable

from matplotlib.figure import Figure

from helpers.explorers.export import ABSENT, batches, export_figure
from helpers.explorers.figures import depths, drift_figure, freezing_figure, recorded_depths, transfer_figure
from helpers.explorers.lora import BACKBONES, OPTIMIZERS, PRECISIONS, lora_figure, ranks
from helpers.figures import image
from helpers.recordings.formats import MODELS
from helpers.recordings.transfer import TASKS, recorded
from helpers.shifts import KINDS, STATISTICS


class Explorer:
    """Controls and the figure of their values; displays as a widget, or as static figures where there are none.

    JupyterLab runs the callbacks of different controls in threads of their own, so each waits until none else is at work,
    in whichever explorer: they share models.

    A subclass makes its controls, hands them to this `__init__` row by row, and says the rest.
    """

    figure: Callable[..., tuple[Figure, str]]  # settings -> figure, text alternative
    examples: tuple[tuple, ...]  # the settings of the static figures
    _one_at_a_time = threading.RLock()

    def __init__(self, *rows) -> None:
        import ipywidgets as widgets  # here: a figure needs no widgets

        self._adapting, self._drawn = False, None
        self.picture = widgets.HTML()
        boxes = [widgets.HBox(row) if isinstance(row, list) else row for row in rows]
        self.widget = widgets.VBox([*boxes, self.picture])
        for row in rows:
            for control in row if isinstance(row, list) else [row]:
                control.observe(self._redraw, "value")
        self._redraw()

    def settings(self) -> tuple | None:
        """The arguments of `figure` for what the controls say now.

        None if they do not go together: one has just changed, and its own callback is waiting to put the others right.
        """
        raise NotImplementedError

    def adapt(self) -> None:
        """Let controls offer what goes with the values of others; called before each drawing."""

    def _redraw(self, _: object = None) -> None:
        with self._one_at_a_time:
            if self._adapting:
                return  # one new figure, not one for every knob that moves along
            self._adapting = True
            try:
                self.adapt()
            finally:
                self._adapting = False
            settings = self.settings()
            if settings not in (None, self._drawn):
                self.picture.value = image(*self.figure(*settings))
                self._drawn = settings

    def _repr_mimebundle_(self, **options: object) -> dict:
        return self.widget._repr_mimebundle_(**options) | static(type(self))


def static(explorer: type[Explorer]) -> dict[str, str]:
    """An explorer's examples as figures, for pages in which no kernel runs."""
    with Explorer._one_at_a_time:
        drawn = [explorer.figure(*settings) for settings in explorer.examples]
    return {"text/html": "<br>".join(image(*figure) for figure in drawn), "text/plain": " ".join(alt for _, alt in drawn)}


class StaticFigure:
    """What an explorer is where ipywidgets is not installed."""

    def __init__(self, explorer: type[Explorer]) -> None:
        self.explorer = explorer

    def _repr_mimebundle_(self, **_: object) -> dict:
        return static(self.explorer)


def explore(explorer: type[Explorer]) -> Explorer | StaticFigure:
    """The explorer, or its examples as figures where ipywidgets is not installed."""
    try:
        return explorer()
    except ImportError:
        return StaticFigure(explorer)


class TransferExplorer(Explorer):
    figure = staticmethod(transfer_figure)
    examples = tuple((task, 5, known.arms) for task, known in TASKS.items())

    def __init__(self) -> None:
        import ipywidgets as widgets

        self.task = widgets.ToggleButtons(options=list(TASKS), description="task")
        self.labels = widgets.SelectionSlider(options=sorted(recorded("digits")), description="labels")
        self.arms = [widgets.Checkbox(value=True, description=arm, indent=False) for arm in TASKS["digits"].arms]
        super().__init__(self.task, self.labels, self.arms)

    def adapt(self) -> None:
        _offer(self.labels, sorted(recorded(self.task.value)))
        for box, arm in zip(self.arms, TASKS[self.task.value].arms, strict=True):
            box.description = arm

    def settings(self) -> tuple | None:
        task, labels = self.task.value, self.labels.value
        chosen = tuple(arm for arm, box in zip(TASKS[task].arms, self.arms, strict=True) if box.value)
        return (task, labels, chosen) if labels in recorded(task) else None


class FreezingExplorer(Explorer):
    figure = staticmethod(freezing_figure)
    examples = tuple((task, 2, 10) for task in TASKS)

    def __init__(self) -> None:
        import ipywidgets as widgets

        self.task = widgets.ToggleButtons(
            options=[("glyphnet on digits", "digits"), ("all-MiniLM-L6-v2 on docstrings", "docstrings")],
            description="backbone",
            style={"button_width": "auto"},
        )
        self.depth = widgets.SelectionSlider(options=list(depths("digits")), description="train", layout={"width": "420px"})
        known = list(recorded_depths("digits"))
        self.labels = widgets.ToggleButtons(
            options=known, value=10 if 10 in known else None, description="labels", style={"button_width": "auto"}
        )
        super().__init__(self.task, self.depth, self.labels)

    def adapt(self) -> None:
        labels = list(recorded_depths(self.task.value))
        _offer(self.depth, list(depths(self.task.value)))
        _offer(self.labels, labels)
        self.labels.layout.display = None if len(labels) > 1 else "none"

    def settings(self) -> tuple | None:
        task, strategy = self.task.value, self.depth.value
        names = list(depths(task))
        return (task, names.index(strategy), self.labels.value) if strategy in names else None


class DriftExplorer(Explorer):
    figure = staticmethod(drift_figure)
    examples = (("grey paper", 0.3, "stored"), ("grey paper", 0.3, "recomputed"))

    def __init__(self) -> None:
        import ipywidgets as widgets

        self.kind = widgets.ToggleButtons(
            options=KINDS, value="grey paper", description="images", style={"button_width": "auto"}
        )
        strengths = [(f"{tenths / 10:.1f}", tenths / 10) for tenths in range(11)]
        self.strength = widgets.SelectionSlider(
            options=strengths, value=0.3, description="strength", continuous_update=False
        )  # not while it is dragged: each position is measured
        self.using = widgets.ToggleButtons(options=STATISTICS, description="statistics")
        super().__init__(self.kind, self.strength, self.using)

    def adapt(self) -> None:
        self.strength.disabled = self.kind.value == KINDS[0]

    def settings(self) -> tuple:
        return self.kind.value, self.strength.value, self.using.value


class LoraExplorer(Explorer):
    figure = staticmethod(lora_figure)
    examples = (
        ("MiniLM", "queries and values", 8, "AdamW", "float32"),
        ("glyphnet", "every convolution", 4, "AdamW", "float32"),
    )

    def __init__(self) -> None:
        import ipywidgets as widgets

        wide = {"style": {"button_width": "auto"}}
        self.backbone = widgets.ToggleButtons(
            options=[(known.title, name) for name, known in BACKBONES.items()], description="backbone", **wide
        )
        first = next(iter(BACKBONES))
        self.layers = widgets.ToggleButtons(options=list(BACKBONES[first].layers), description="layers", **wide)
        self.rank = widgets.SelectionSlider(options=ranks(first, self.layers.value), value=8, description="rank")
        self.optimizer = widgets.ToggleButtons(options=list(OPTIMIZERS), value="AdamW", description="optimizer", **wide)
        self.precision = widgets.ToggleButtons(options=list(PRECISIONS), description="precision", **wide)
        super().__init__(self.backbone, self.layers, self.rank, self.optimizer, self.precision)

    def adapt(self) -> None:
        backbone = self.backbone.value  # once: another thread may change it meanwhile
        _offer(self.layers, list(BACKBONES[backbone].layers))
        _offer(self.rank, ranks(backbone, self.layers.value))

    def settings(self) -> tuple | None:
        backbone, layers, rank = self.backbone.value, self.layers.value, self.rank.value
        fits = layers in BACKBONES[backbone].layers and rank in ranks(backbone, layers)
        return (backbone, layers, rank, self.optimizer.value, self.precision.value) if fits else None


class ExportExplorer(Explorer):
    figure = staticmethod(export_figure)
    examples = tuple((model, None, ()) for model in MODELS)

    def __init__(self) -> None:
        import ipywidgets as widgets

        self.model = widgets.ToggleButtons(options=list(MODELS), description="model")
        self.batch = widgets.ToggleButtons(options=list(batches(self.model.value)), description="batch")
        self.absent = [widgets.Checkbox(value=False, description=f"without {name}", indent=False) for name in ABSENT]
        super().__init__(self.model, self.batch, self.absent)

    def adapt(self) -> None:
        _offer(self.batch, list(batches(self.model.value)))

    def settings(self) -> tuple | None:
        model, batch = self.model.value, self.batch.value
        absent = tuple(name for name, box in zip(ABSENT, self.absent, strict=True) if box.value)
        return (model, batch, absent) if batch in [*batches(model), None] else None


def _offer(control, options: list) -> None:
    """Give a control other options; the value stays if it is among them, else it is the first."""
    if list(control.options) != options:
        value = control.value
        control.options = options
        control.value = value if value in options else next(iter(options), None)
