import pytest

from helpers import environment
from helpers.environment import describe_environment, here_and_now, recorded_on


def test_it_says_what_this_kernel_runs_on(capsys, monkeypatch):
    monkeypatch.delenv("WARMSTART_OFFLINE", raising=False)
    describe_environment()
    out = capsys.readouterr().out
    assert out.startswith("Python 3.") and "torch 2." in out and "device: " in out and "network: not needed so far" in out
    monkeypatch.setenv("WARMSTART_OFFLINE", "1")
    describe_environment()
    assert "network: off (WARMSTART_OFFLINE is set)" in capsys.readouterr().out


def test_what_is_missing_is_named_with_how_to_get_it(monkeypatch):
    monkeypatch.setattr(environment, "PACKAGES", ("torch", "no-such-package"))
    with pytest.raises(ImportError) as error:
        describe_environment()
    wanted = "the course needs no-such-package. Install it into this kernel: %pip install no-such-package"
    assert str(error.value) == wanted


def test_recordings_say_where_and_when_each_was_made():
    now = here_and_now("torch")
    assert now["machine"].endswith(" CPU, one thread") and now["versions"].keys() == {"torch"}
    later, elsewhere = now | {"date": "2999-01-01"}, now | {"machine": "abacus", "date": "1202-01-01"}
    here = f"recorded on an {now['machine']}, {now['date']}"
    assert recorded_on([now, now]) == here
    assert recorded_on([later, now, elsewhere]) == f"{here} and 2999-01-01; on an abacus, 1202-01-01"
