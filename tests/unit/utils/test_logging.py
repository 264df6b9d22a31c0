import logging
import re
import subprocess
import sys

import pytest

from roll_opd.utils.logging import configure_logging, get_logger, log_file_path


@pytest.fixture(autouse=True)
def root_as_before():
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in [handler for handler in root.handlers if handler not in handlers]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)


def test_lines_go_to_standard_error_and_the_file_in_one_format(tmp_path, capsys):
    path = log_file_path(tmp_path / "logs", "actor_train-0")
    configure_logging("INFO", path, process="actor_train-0")
    get_logger("roll_opd.some").info("loss %.1f", 2.0)
    get_logger("roll_opd.some").debug("hidden")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"\d\d:\d\d:\d\d INFO actor_train-0 roll_opd\.some: loss 2\.0\n", captured.err)
    assert path.read_text() == captured.err


def test_configuring_again_replaces_the_handlers(tmp_path, capsys):
    configure_logging("INFO", tmp_path / "a.log")
    configure_logging("WARNING", tmp_path / "b.log", process="100%")
    get_logger("x").info("hidden")
    get_logger("x").warning("once")
    assert capsys.readouterr().err.count("WARNING 100% x: once\n") == 1
    assert (tmp_path / "a.log").read_text() == ""
    assert (tmp_path / "b.log").read_text().count("once") == 1


def test_libraries_are_quiet_but_their_warnings_stay(capsys):
    configure_logging("DEBUG")
    get_logger("transformers").info("chatter")
    get_logger("urllib3.connectionpool").debug("chatter")
    get_logger("urllib3.connectionpool").warning("careful")  # ray, once imported, keeps its own handlers
    err = capsys.readouterr().err
    assert "chatter" not in err and "careful" in err


def test_a_process_name_cannot_leave_the_folder(tmp_path):
    assert log_file_path(tmp_path, "../teacher/math 0").parent == tmp_path


@pytest.mark.parametrize(
    "module", ["logging", "tracking", "console", "samples_page", "episode_log", "run_folder", "files"]
)
def test_modules_import_without_heavy_libraries(module):
    code = (
        f"import sys, roll_opd.utils.{module}; "
        "sys.exit(', '.join({'torch', 'ray', 'transformers', 'tensorboard', 'wandb'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
