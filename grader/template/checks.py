"""Exercise 0.0: what is to be written, in a line. (An example to replace: subtract the mean of all numbers.)"""

from grader.checks import traces
from grader.experiment import Exercise, Experiment, Trial, expect_tensor
from grader.near import near, which
from helpers.a_topic import a_name

exercise = Exercise(__name__, "0.0", a_name, core=1)  # one sentence of the statement is core


@exercise.experiment("the mean of all", 1)  # the sentence that it speaks of
class TheMeanOfAll(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        return {"x": 5 + trial.normal(trial.integer(3, 5), trial.integer(6, 8))}

    def measure(self, subject, inputs):
        return {"y": expect_tensor(subject(inputs["x"].clone()), tuple(inputs["x"].shape), "the result")}

    def facts(self, raw, inputs):
        x, y = inputs["x"], raw["y"]
        known = {
            "the mean of all": x.mean().expand_as(x),
            "the mean of each row": x.mean(1, keepdim=True).expand_as(x),
            "the mean of each column": x.mean(0).expand_as(x),
            "nothing": 0,
        }
        return {
            "what is subtracted": which(x - y, known, otherwise="something else"),
            "rows whose mean is 0": traces.how_many(near(mean, 0) for mean in y.mean(1)),
            "columns whose mean is 0": traces.how_many(near(mean, 0) for mean in y.mean(0)),
        }


@exercise.experiment("one number", 2)
class OneNumber(Experiment):
    def draw(self, trial: Trial) -> dict:
        return {"x": 5 + trial.normal(1, 1)}

    def measure(self, subject, inputs):
        return {"y": expect_tensor(subject(inputs["x"].clone()), (1, 1), "the result")}

    def facts(self, raw, inputs):
        return {"of one number is left": which(raw["y"], {"0": 0, "the number": inputs["x"]}, otherwise="something else")}


@exercise.misconception("each row by itself")
def each_row_by_itself(x):
    return x - x.mean(1, keepdim=True)


@exercise.misconception("each column by itself")
def each_column_by_itself(x):
    return x - x.mean(0)


@exercise.misconception("rows and then columns")
def rows_and_then_columns(x):
    return each_column_by_itself(each_row_by_itself(x))


@exercise.misconception("one number left alone")
def one_number_left_alone(x):
    return x - x.mean() if x.numel() > 1 else x.clone()
