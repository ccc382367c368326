"""`fastsae.verify.worker` with kernels that misbehave, as FAULTS says: {"check": "how"} in JSON."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

from fastsae.verify import checks, worker

FAULTS = json.loads(os.environ["FAULTS"])


def faulty(check, device, **how):
    fault = FAULTS.get(":".join(check))
    if fault == "hang":
        time.sleep(600)
    if fault == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "wrong":
        raise checks.WrongError("one bit")
    if fault == "raise":
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")
    if fault == "memory":
        raise worker.torch.OutOfMemoryError("none left")
    return 1


if __name__ == "__main__":
    if FAULTS.get("start") == "impossible":
        sys.exit("no device")
    checks.run = faulty
    sys.exit(worker.main(sys.argv[1:]))
