"""An experiment that tests of proofs and records run: is half of x returned, but for rounding?"""

from grader.experiment import Experiment
from grader.near import near


class Halves(Experiment):
    key = claim = "halves"

    def draw(self, trial):
        return {"x": trial.normal(3)}

    def measure(self, subject, inputs):
        return {"y": subject(inputs["x"])}

    def facts(self, raw, inputs):
        return {"y": "half" if near(raw["y"], inputs["x"] / 2) else "other"}
