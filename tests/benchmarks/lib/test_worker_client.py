"""Worker processes: answers, ends, and files that they run."""

import sys
from pathlib import Path

import pytest

from benchmarks.lib.worker_client import WorkerError, WorkerProcess, worker_command


def python_worker(code: str) -> WorkerProcess:
    return WorkerProcess("the worker", [sys.executable, "-c", code])


def test_worker_answers() -> None:
    worker = python_worker("import sys\nfor line in sys.stdin: print(line, end='', flush=True)")
    assert worker.ask(30, do="x", n=1) == {"do": "x", "n": 1}
    worker.close()
    worker.close()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise SystemExit('no such engine')", "exit code 1; it printed:\nno such engine"),
        ("import os; os.abort()", "SIGABRT"),
        (
            'input(); print(\'{"error": "out of rows", "number": 1}\', flush=True); input()',
            "the worker: out of rows",
        ),
        ("input(); print('noise', flush=True); input()", "answered b'noise'; allowed: a JSON"),
        ("input(); print(5, flush=True); input()", "answered b'5'; allowed"),
        ("input(); print('[\"error\"]', flush=True); input()", "answered b'.\"error\".'; allowed"),
        ("input(); print('{\"number\": 7}', flush=True); input()", "the request's number, 1"),
        ("import time; time.sleep(60)", "no answer in 1 seconds"),
    ],
)
def test_worker_that_fails_says_why(code: str, message: str) -> None:
    worker = python_worker(code)
    with pytest.raises(WorkerError, match=message):
        worker.ask(1 if "sleep" in code else 30, do="x")
    worker._process.kill()
    worker.close()


def test_a_late_answer_is_nobodys() -> None:
    """After a timeout the worker has ended: the next request gets no answer of the first."""
    worker = python_worker(
        "import sys, time\n"
        "for line in sys.stdin:\n"
        "    time.sleep(2 if 'slow' in line else 0)\n"
        "    print(line, end='', flush=True)"
    )
    assert worker.ask(30, do="start") == {"do": "start"}
    with pytest.raises(WorkerError, match="no answer in 0 seconds"):
        worker.ask(0.2, do="slow")
    with pytest.raises(WorkerError, match="ended with SIGKILL"):
        worker.ask(30, do="next")
    worker.close()


def test_a_worker_file_finds_no_sibling(tmp_path: Path) -> None:
    """`engines/` has files with the names of frameworks: none may be what a worker imports."""
    (tmp_path / "timing.py").write_text("raise RuntimeError('a sibling')")
    file = tmp_path / "some_worker.py"
    file.write_text(
        "import sys\n"
        "class Worker:\n"
        "    def names(self, *modules):\n"
        "        print('noise')\n"
        "        return {'path': sys.path}\n"
        "    def find(self, module):\n"
        "        import importlib.util\n"
        "        return {'found': importlib.util.find_spec(module) is not None}\n"
    )
    worker = WorkerProcess("it", worker_command(sys.executable, file))
    try:
        path = worker.ask(30, do="names")["path"]
        assert str(tmp_path) not in path
        assert str(Path(worker_command("", file)[1]).parent) not in path
        assert worker.ask(30, do="find", module="timing") == {"found": False}
        assert worker.ask(30, do="find", module="worker_loop") == {"found": False}
        with pytest.raises(WorkerError, match="AttributeError"):
            worker.ask(30, do="nothing of the kind")
    finally:
        worker.close()
