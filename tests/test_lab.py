"""Chapter 02 in real JupyterLab, in headless Chromium, as a student meets it.

Other tests look at what a notebook computes. These look at the page: whether the words of a failed check are there and
readable in both themes, whether the figures show something, and whether "Run All" stops and goes on where it should.
The pictures in `artefacts/` are for people to look at, and `check.png` is for the README.
"""

import base64
import http.client
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
from nbformat import NotebookNode
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, sync_playwright
from playwright.sync_api import TimeoutError as NeverHappened

from grader.checks import exercises
from grader.experiment import Misconception
from grader.quiz import quiz
from grader.sample import CHAPTER, source_as, with_answers
from helpers.recordings.transfer import recorded

pytestmark = pytest.mark.slow

NUMBER = next(number for number, exercise in exercises("features").items() if exercise.name == "extract")
CHECK = f"check-{NUMBER.replace('.', '_')}"  # where the notebook with the mistake stops
ROOT = Path(__file__).parents[1]
ARTEFACTS = ROOT / "artefacts"
TOKEN = "a-student"
PATIENCE = 180  # seconds until a wait is given up; nothing is expected to come near it
LAPTOP = {"width": 1366, "height": 768}
TALL = {"width": 1366, "height": 1600}  # high enough for the figure, the exercise and its check in one picture
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
PROMPTS = "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(prompt => prompt.textContent)"
STDERR = '[data-mime-type="application/vnd.jupyter.stderr"]'  # an error's text is shown as this too
THEMES = {"light": "JupyterLab Light", "dark": "JupyterLab Dark"}

# Variables that would change what the kernel does, should this process happen to have them.
PERSONAL = ("MPLBACKEND", "NBGRADER_EXECUTION", "PYTHONWARNINGS", "WARMSTART_SEEDS")


# --- a failed check -----------------------------------------------------------------------------------------------


def test_a_failed_check_names_the_missing_idea(stopped: Page) -> None:
    shown = squeezed(cell(stopped, CHECK).text_content())
    assert "not yet" in shown and "likely" in shown
    assert squeezed(misconception().hint) in shown
    assert f"{NUMBER} is not passed yet" in shown


def test_a_failed_check_shows_no_traceback(stopped: Page) -> None:
    shown = squeezed(" ".join(stopped.locator(".jp-OutputArea-output").all_text_contents()))
    assert f"{NUMBER} is not passed yet" in shown
    assert "---> " not in shown and "Traceback" not in shown


def test_run_all_stops_at_the_failed_check(stopped: Page) -> None:
    check = index_of(CHECK)
    for index in code_cells():
        prompt = cell(stopped, index).locator(".jp-InputPrompt").text_content()
        assert bool(re.search(r"\d", prompt)) == (index <= check), f"cell {index} shows {prompt}"


@pytest.mark.parametrize("theme", THEMES)
def test_the_failed_check_and_the_figure_are_readable(stopped: Page, theme: str) -> None:
    use_theme(stopped, theme)
    stopped.set_viewport_size(LAPTOP)
    check = cell(stopped, CHECK)
    texts = check.locator(".jp-OutputArea-output pre").all()
    assert len(texts) == 2  # what the check printed, and the sentence with which it stopped
    for text in texts:
        assert_lines_are_whole(text)
        assert_stands_out(shades_of(text.screenshot()))
    assert_shows_something(figure(stopped, first_figure()))
    take_picture(stopped, cell(stopped, first_figure()), ARTEFACTS / f"lab_{theme}.png")
    if theme == "light":
        check.screenshot(path=ARTEFACTS / "check.png")


# --- the right answers --------------------------------------------------------------------------------------------


def test_the_right_answers_reach_the_end(finished: Page) -> None:
    progress = squeezed(last_code_cell(finished).text_content())
    for number, exercise in exercises("features").items():
        shown = squeezed(cell(finished, "check-" + number.replace(".", "_")).text_content())
        assert number in shown and "passed" in shown and "not yet" not in shown
        assert re.search(rf"{number} {exercise.name} (\d+) of \1 points passed", progress)
    assert finished.locator(STDERR).all_text_contents() == []  # neither errors nor warnings


def test_every_figure_shows_something(finished: Page) -> None:
    for index in figure_cells():
        assert_shows_something(figure(finished, index))


def test_every_figure_has_a_text_alternative(finished: Page) -> None:
    for index in figure_cells():
        assert len(figure(finished, index).get_attribute("alt")) > 40


def test_a_prediction_stands_beside_its_result(finished: Page) -> None:
    shown = [text for text in finished.locator(".jp-OutputArea-output").all_text_contents() if "predicted" in text]
    assert any(re.search(r"features\s+0\.9\d\d ± 0\.\d{3}\s+0\.900  off by", text) for text in shown), shown


@pytest.mark.parametrize("theme", THEMES)
def test_a_click_on_a_choice_says_whether_it_is_right_and_why(finished: Page, theme: str) -> None:
    use_theme(finished, theme)
    finished.set_viewport_size(TALL)
    questions = quiz("features", seed=0).questions  # the same for both themes, which click on different choices
    page_quiz = cell(finished, next(i for i in code_cells() if 'quiz("features")' in released().cells[i].source))
    page_quiz.scroll_into_view_if_needed()
    assert page_quiz.locator("details").count() == sum(len(question["choices"]) for question in questions)
    for choice in (question["choices"][theme == "dark"] for question in questions):
        details = page_quiz.locator("details", has=finished.get_by_text(plain(choice["text"]), exact=True))
        reason = details.locator("p")
        assert not reason.is_visible()
        details.locator("summary").click()
        assert squeezed(reason.text_content()) == plain(("Right. " if choice["right"] else "No. ") + choice["reason"])
        assert_stands_out(shades_of(reason.screenshot()))
    take_picture(finished, page_quiz, ARTEFACTS / f"quiz_{theme}.png")


@pytest.mark.parametrize("theme", THEMES)
def test_moving_the_slider_changes_the_figure(finished: Page, theme: str) -> None:
    use_theme(finished, theme)
    finished.set_viewport_size(TALL)
    explorer = cell(finished, next(i for i in code_cells() if "explore_transfer()" in released().cells[i].source))
    explorer.scroll_into_view_if_needed()
    picture, handle = explorer.locator(".widget-html-content img"), explorer.locator(".noUi-handle")
    handle.focus()
    handle.press("Home")
    for labels in (1, 2, 5, 10):
        explorer.locator(f"img[alt*='With {labels} per class']").wait_for()
        assert_shows_something(picture)
        handle.press("ArrowRight")
    means = recorded("digits")[10]
    assert all(f"{arm} {sum(draws) / len(draws):.3f}" in picture.get_attribute("alt") for arm, draws in means.items())
    take_picture(finished, explorer, ARTEFACTS / f"explorer_{theme}.png")
    explorer.get_by_label("probe", exact=True).uncheck()
    explorer.locator("img:not([alt*='probe'])").wait_for()
    explorer.get_by_label("probe", exact=True).check()
    explorer.get_by_role("button", name="docstrings").click()
    explorer.locator("img[alt*='TF-IDF']").wait_for()
    assert_shows_something(picture)
    explorer.get_by_role("button", name="digits").click()
    explorer.locator("img[alt*='raw pixels']").wait_for()


@pytest.mark.parametrize("drawn", ["nothing", "axes"])
def test_a_figure_without_data_counts_as_blank(drawn: str) -> None:
    """The control: a figure in which nothing, or nothing but the axes, was drawn."""
    fig, ax = plt.subplots(figsize=(6, 2.6))
    ax.axis("off" if drawn == "nothing" else "on")
    file = io.BytesIO()
    fig.savefig(file)
    plt.close(fig)
    with pytest.raises(AssertionError, match="blank"):
        assert_not_blank(shades_of(file.getvalue()))


# --- the student's notebooks --------------------------------------------------------------------------------------


def misconception() -> Misconception:
    """The mistake that this student makes in feature extraction."""
    return next(m for m in exercises("features")[NUMBER].misconceptions if m.key == "train mode during extraction")


@cache
def released() -> NotebookNode:
    return nbformat.read(ROOT / "course" / CHAPTER / f"{CHAPTER}.ipynb", 4)


def with_the_mistake() -> NotebookNode:
    return with_answers(released(), {NUMBER: source_as(misconception().subject, "extract")})


def with_right_answers() -> NotebookNode:
    solved = nbformat.read(ROOT / "solutions" / CHAPTER / f"{CHAPTER}.ipynb", 4)
    answers = {n: solved.cells[index_of("answer-" + n.replace(".", "_"), solved)].source for n in exercises("features")}
    notebook = with_answers(released(), answers)
    guess = next(cell for cell in notebook.cells if "features=None" in cell.source)
    guess.source = guess.source.replace("features=None", "features=0.9")
    return notebook


def index_of(grade_id: str, notebook: NotebookNode | None = None) -> int:
    """Where a cell stands in the chapter, by the name that nbgrader has for it."""
    cells = (notebook or released()).cells
    return next(i for i, c in enumerate(cells) if c.metadata.get("nbgrader", {}).get("grade_id") == grade_id)


def code_cells() -> list[int]:
    return [i for i, c in enumerate(released().cells) if c.cell_type == "code"]


def figure_cells() -> list[int]:
    return [i for i in code_cells() if "show(fig" in released().cells[i].source]


def first_figure() -> int:
    """The cell that draws the labelled digits, above the first exercises."""
    index = figure_cells()[0]
    assert index < index_of(CHECK)
    return index


# --- JupyterLab and the browser -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's Chromium: playwright's own download is not needed, and often cannot be had."""
    path = shutil.which("chromium")
    if path is None and os.environ.get("CI"):
        pytest.fail("There is no chromium on the PATH, and CI must open the notebooks: apt-get install chromium.")
    if path is None:
        pytest.skip("needs Debian's chromium (apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a JupyterLab that serves a copy of the chapter and knows nothing of this user's settings."""
    home = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "course" / CHAPTER, home / "work" / CHAPTER)
    nbformat.write(with_the_mistake(), home / "work" / CHAPTER / f"{CHAPTER}.ipynb")
    nbformat.write(with_right_answers(), home / "work" / CHAPTER / "right.ipynb")
    settle(home / "settings")
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1"]
    command += ["--ServerApp.port=0", f"--IdentityProvider.token={TOKEN}"]
    log = home / "log.txt"
    with log.open("wb") as file:
        server = subprocess.Popen(
            command, cwd=home / "work", env=environment(home), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        )
    try:
        yield address(server, home / "runtime", log)
    finally:
        server.terminate()  # it ends its kernels first; a kernel whose server was killed ends itself
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def environment(home: Path) -> dict[str, str]:
    """This process's environment, with a Jupyter and an IPython that find nothing of the user's and leave nothing behind."""
    places = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",  # the kernel is found beside Python itself
        "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "IPYTHONDIR": "ipython",
    }
    kept = {name: value for name, value in os.environ.items() if name not in PERSONAL}
    return kept | {name: str(home / folder) for name, folder in places.items()}


def settle(settings: Path) -> None:
    """JupyterLab settings without which pictures of its page would depend on luck.

    By default it only estimates the height of what lies outside the window, so that the page moves while it is looked at,
    and it asks whether it may fetch news, on top of the notebook.
    """
    chosen = {
        "notebook-extension/tracker": {"windowingMode": "none"},
        "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    }
    for name, values in chosen.items():
        file = settings / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(values), encoding="utf-8")


def address(server: subprocess.Popen, runtime: Path, log: Path) -> str:
    """Wait until the server has said which port it got and answers there."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and server.poll() is None:
        for file in runtime.glob("jpserver-*.json"):
            with suppress(ValueError, OSError, http.client.HTTPException):  # half written, or not listening yet
                url = json.loads(file.read_text(encoding="utf-8"))["url"]
                if answers(url):
                    return url
        with suppress(subprocess.TimeoutExpired):
            server.wait(0.2)
    state = "is running and does not answer" if server.poll() is None else f"ended with exit code {server.returncode}"
    tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-40:])
    pytest.fail(f"JupyterLab {state}. The end of its log:\n{tail}", pytrace=False)


def answers(url: str) -> bool:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=PATIENCE)
    try:
        connection.request("GET", "/api")
        return connection.getresponse().status == 200
    finally:
        connection.close()


@pytest.fixture(scope="module")
def stopped(browser: Browser, lab: str) -> Iterator[Page]:
    """The notebook with the mistake, after "Run All"."""
    yield from after_run_all(browser, f"{lab}lab/tree/{CHAPTER}/{CHAPTER}.ipynb")


@pytest.fixture(scope="module")
def finished(browser: Browser, lab: str) -> Iterator[Page]:
    """The notebook with the right answers, after "Run All"."""
    yield from after_run_all(browser, f"{lab}lab/tree/{CHAPTER}/right.ipynb")


def after_run_all(browser: Browser, url: str) -> Iterator[Page]:
    """Open a notebook in a browser of its own, run all its cells from the menu, and wait until none is running."""
    context = browser.new_context(viewport=LAPTOP, device_scale_factor=2)
    context.set_default_timeout(PATIENCE * 1000)
    page = context.new_page()
    page.goto(f"{url}?reset&token={TOKEN}")
    page.locator("#jp-main-statusbar").get_by_text("| Idle").wait_for()  # before that, "Run All" does nothing and says nothing
    choose(page, "Run", "Run All Cells")
    try:
        # Every cell waiting for its turn shows [*] from the start; one that ran shows its number.
        page.wait_for_function(f"() => /\\d/.test({PROMPTS}) && !/\\*/.test({PROMPTS})")
        page.wait_for_function(f"() => document.querySelectorAll('.jp-Cell').length === {len(released().cells)}")
    except NeverHappened:
        pytest.fail(f"Run All did not end, or cells are missing from the page: {page.evaluate(PROMPTS)}", pytrace=False)
    yield page
    context.close()


def choose(page: Page, *path: str) -> None:
    """Choose an entry of JupyterLab's menu, as a mouse would."""
    menu, *entries = path
    page.locator(".lm-MenuBar-itemLabel").get_by_text(menu, exact=True).click()
    for entry in entries:
        page.locator(".lm-Menu-itemLabel").get_by_text(entry, exact=True).click()


def use_theme(page: Page, theme: str) -> None:
    choose(page, "Settings", "Theme", THEMES[theme])
    page.locator(f"body[data-jp-theme-name='{THEMES[theme]}']").wait_for(state="attached")


def take_picture(page: Page, top: Locator, path: Path) -> None:
    """A picture of the window with one cell at its top."""
    page.set_viewport_size(TALL)
    top.evaluate("cell => cell.scrollIntoView()")
    page.screenshot(path=path)


# --- what is on the page ------------------------------------------------------------------------------------------


def cell(page: Page, which: int | str) -> Locator:
    """A cell by its place in the chapter, or by the name that nbgrader has for it."""
    return page.locator(".jp-Cell").nth(which if isinstance(which, int) else index_of(which))


def last_code_cell(page: Page) -> Locator:
    return cell(page, code_cells()[-1])


def figure(page: Page, index: int) -> Locator:
    return cell(page, index).locator(".jp-OutputArea-output img")


def squeezed(text: str | None) -> str:
    """Text with every run of blanks and line ends as one blank, since long lines are wrapped."""
    return " ".join((text or "").split())


def plain(text: str) -> str:
    """The text of a question, a choice or a reason as the page shows it."""
    return squeezed(text.replace("`", ""))


def shades_of(png: bytes, size: tuple[int, int] | None = None) -> np.ndarray:
    """A picture in shades of grey, 0 to 255, scaled to a width and height if they are given."""
    picture = Image.open(io.BytesIO(png)).convert("L")
    return np.asarray(picture.resize(size, Image.Resampling.BOX) if size else picture).astype(int)


def assert_shows_something(figure: Locator) -> None:
    """A figure that is not blank, and that the page shows as matplotlib made it."""
    made = base64.b64decode(figure.get_attribute("src").partition("base64,")[2])
    assert_not_blank(shades_of(made))
    coarse = tuple(side // 8 for side in Image.open(io.BytesIO(made)).size)  # so that a shift by one pixel matters little
    wanted, shown = shades_of(made, coarse), shades_of(figure.screenshot(), coarse)
    alike = np.corrcoef(wanted.ravel(), shown.ravel())[0, 1]
    assert alike > 0.85, f"the page does not show the figure: the correlation with it is {alike:.2f}"


def assert_not_blank(shades: np.ndarray) -> None:
    """A figure with more in it than axes and a title."""
    inked = (np.abs(shades - np.bincount(shades.ravel()).argmax()) > 20).mean()
    description = f"{len(np.unique(shades))} shades, standard deviation {shades.std():.1f}, {inked:.1%} inked"
    assert len(np.unique(shades)) > 50 and shades.std() > 15 and inked > 0.025, f"the figure is blank: {description}"


def assert_stands_out(shades: np.ndarray) -> None:
    """Text whose strokes differ clearly from what lies behind them."""
    background = int(np.bincount(shades.ravel()).argmax())
    furthest = np.abs(shades - background).max()
    assert furthest > 150, f"the text differs from its background by no more than {furthest} of 255 shades"


def assert_lines_are_whole(text: Locator) -> None:
    """Text whose lines are neither wrapped by the browser nor cut off at its right edge."""
    text.scroll_into_view_if_needed()
    shown = text.evaluate(
        """element => {
            const range = document.createRange();
            range.selectNodeContents(element);
            return {lines: new Set([...range.getClientRects()].map(box => Math.round(box.top))).size,
                    cut: element.scrollWidth > element.clientWidth};
        }"""
    )
    written = len(text.text_content().rstrip("\n").splitlines())
    assert shown == {"lines": written, "cut": False}, f"{written} lines were printed, the page shows {shown}"
