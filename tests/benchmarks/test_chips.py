"""Benchmarks that compile for chips which need not be there."""

from importlib import metadata

from benchmarks import chips
from benchmarks.memory import fits
from examples.common.cli import exit_status


def test_missing_compilers_are_refused_in_one_line(monkeypatch, tmp_path, capsys):
    """Without libtpu the error is one line that says what to install, and no traceback."""

    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(chips.metadata, "version", version)
    assert exit_status(lambda: fits.main(fits.Options(model=("gpt2",), output=tmp_path))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the compiler for TPUs, libtpu, is not installed")
