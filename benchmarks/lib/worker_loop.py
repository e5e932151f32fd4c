"""What runs in a worker process: it answers JSON requests, one line each.

Run by path, `PYTHON worker_loop.py WORKER.py`, in whatever environment has what the worker needs:
this file and the worker's import nothing of this project, and neither folder is on the search path
(`engines/` has files with the names of frameworks). The worker's file defines the class `Worker`.
"""

import json
import os
import runpy
import sys
import traceback


def answer_requests(make_worker):
    """Until standard input ends: {"do": method, "number": n, ...arguments} becomes that method's
    answer, with the number.

    The worker is made at the first request. Whatever goes wrong is the answer {"error": text}.
    """
    # Whatever a library prints goes to the error stream: standard output is the protocol's.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    worker = None
    for line in sys.stdin:
        request = json.loads(line)
        action, number = request.pop("do"), request.pop("number")
        try:
            if worker is None:
                worker = make_worker()
            answer = getattr(worker, action)(**request)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps({**answer, "number": number}) + "\n")


def load(path):
    """The class `Worker` of the file."""
    return runpy.run_path(path)["Worker"]


if __name__ == "__main__":
    sys.path.pop(0)  # the folder of this file
    answer_requests(load(sys.argv[1]))
    # Engines do not always end by themselves; nothing here is worth waiting for.
    sys.stderr.flush()
    os._exit(0)
