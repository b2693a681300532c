"""A function in a forked child of this process, which must end in time."""

import os
import pickle
import signal
import time
import traceback


def in_a_fork(function, seconds: float = 60.0):
    """What `function()` returns in a forked child; an AssertionError if it fails there, or hangs."""
    out, into = os.pipe()
    child = os.fork()
    if not child:
        try:
            result = True, function()
        except BaseException:
            result = False, traceback.format_exc()
        with open(into, "wb") as pipe:
            pickle.dump(result, pipe)
        os._exit(0)
    os.close(into)
    end = time.monotonic() + seconds
    try:
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            assert time.monotonic() < end, f"the child hangs: it has not ended in {seconds:g} s"
            time.sleep(0.01)
    except AssertionError:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    with open(out, "rb") as pipe:  # results fit into the pipe
        done, result = pickle.load(pipe)
    assert done, result
    return result
