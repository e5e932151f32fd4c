"""What every worker does: answer JSON requests, one line each, with the method that they name."""

import json
import os
import sys
import traceback


def answer_requests(make_worker):
    """Until standard input ends: {"do": method, ...arguments} becomes that method's answer.

    The worker is made at the first request. Whatever goes wrong is the answer {"error": text}.
    """
    # Whatever a library prints goes to the error stream: standard output is the protocol's.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    worker = None
    for line in sys.stdin:
        request = json.loads(line)
        action = request.pop("do")
        try:
            if worker is None:
                worker = make_worker()
            answer = getattr(worker, action)(**request)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
