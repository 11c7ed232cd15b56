"""Runs N processes of one job on this machine, and starts the job again after a crash.

The processes find each other over loopback. When one fails, the others are ended and all start again, from their last
checkpoint. SIGTERM or SIGINT is passed on to all as SIGTERM, and their end awaited; a second SIGINT kills them.

exit code: 0 done, or stopped by a signal; 2 an error of the user, which a new start would not help; any other: failed
"""

import argparse
import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

USER_ERROR = 2


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "local.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("n", metavar="N", type=int, help="processes; 1 leaves environment and output as they are")
    parser.add_argument("--devices", type=int, metavar="D", help="GPUs that each process has to itself (default: all)")
    parser.add_argument("--max-restarts", type=int, default=3, metavar="R", help="after crashes (default: 3)")
    parser.add_argument("--log-dir", type=pathlib.Path, metavar="DIR", help="DIR/process-I.log; screen: process 0 only")
    parser.add_argument("--grace", type=float, default=20, metavar="S", help="seconds to end in when one failed")
    parser.add_argument("--stopped-code", type=int, default=0, metavar="C", help="exit code once stopped by a signal")
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="after --; the same for every process")
    args = parser.parse_args()
    if args.n < 1:
        parser.error(f"N: at least 1, got {args.n}")
    if shutil.which(args.command[0]) is None:
        parser.error(f"COMMAND: must be a program, got {args.command[0]}")
    return args


def say(message: str) -> None:
    print(f"local.sh: {message}", file=sys.stderr, flush=True)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(args: argparse.Namespace, index: int, port: int) -> dict[str, str]:
    env = dict(os.environ)
    if args.n > 1:
        env["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{port}"
        env["JAX_NUM_PROCESSES"] = str(args.n)
        env["JAX_PROCESS_ID"] = str(index)
    if args.devices is not None:
        first = index * args.devices
        env["CUDA_VISIBLE_DEVICES"] = ",".join(str(first + i) for i in range(args.devices))
    return env


def copy_lines(process: subprocess.Popen, index: int, log_dir: pathlib.Path | None) -> None:
    """Puts "[index] " before the lines on the screen; a progress bar's carriage return ends a line too."""
    with contextlib.ExitStack() as stack:
        log = None
        if log_dir is not None:
            log = stack.enter_context(open(log_dir / f"process-{index}.log", "a", buffering=1))
        for line in process.stdout or ():
            if log is not None:
                log.write(line)
            if log is None or index == 0:
                sys.stdout.write(f"[{index}] {line}")
                sys.stdout.flush()


def send(processes: list[subprocess.Popen], number: int) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


def describe(code: int) -> str:
    return f"code {code}" if code >= 0 else signal.Signals(-code).name


def run_once(args: argparse.Namespace, processes: list[subprocess.Popen], stops: list[int]) -> int:
    """Starts all, waits for all; returns 0 or the code of the first that failed, 128 + the number for a signal."""
    port = free_port()
    piped = args.n > 1 or args.log_dir is not None
    stdout, stderr = (subprocess.PIPE, subprocess.STDOUT) if piped else (None, None)
    for index in range(args.n):
        env = environment(args, index, port)
        # In sessions of their own, so that Ctrl-C reaches them once, through this program.
        process = subprocess.Popen(
            args.command, env=env, stdout=stdout, stderr=stderr, start_new_session=True, text=True, errors="replace"
        )
        processes.append(process)
    if stops:  # it came before there was anybody to pass it on to
        send(processes, signal.SIGTERM)
    threads = []
    for index, process in enumerate(processes if piped else []):
        threads.append(threading.Thread(target=copy_lines, args=(process, index, args.log_dir), daemon=True))
        threads[-1].start()

    failed: dict[int, int] = {}
    deadline = float("inf")
    while True:
        codes = [process.poll() for process in processes]
        if not failed:
            failed = {index: code for index, code in enumerate(codes) if code}
            if failed:
                found = "; ".join(f"process {index} ended with {describe(code)}" for index, code in failed.items())
                others = f"; the others get SIGTERM, and SIGKILL after {args.grace:g} s" if None in codes else ""
                say(found + others)
                send(processes, signal.SIGTERM)
                deadline = time.monotonic() + args.grace
        if None not in codes:
            break
        if time.monotonic() > deadline:
            send(processes, signal.SIGKILL)
        time.sleep(0.05)
    for thread in threads:
        thread.join(timeout=5)  # a grandchild may hold the pipe open
    # An error of the user in one process may end another first, as a crash.
    code = USER_ERROR if USER_ERROR in codes else next(iter(failed.values()), 0)
    return code if code >= 0 else 128 - code


def main() -> int:
    args = parse_args()
    if args.log_dir is not None:
        args.log_dir.mkdir(parents=True, exist_ok=True)
    stops: list[int] = []
    processes: list[subprocess.Popen] = []

    def stop(number, _):
        again = number == signal.SIGINT and signal.SIGINT in stops
        stops.append(number)
        send(processes, signal.SIGKILL if again else signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)

    for restarts in range(args.max_restarts + 1):
        processes.clear()
        code = run_once(args, processes, stops)
        if stops:
            say(f"stopped by {signal.Signals(stops[0]).name}, code {code}")
            return code or args.stopped_code
        if code == 0:
            return 0
        if code == USER_ERROR:
            say("an error of the user: not started again")
            return code
        if restarts < args.max_restarts:
            say(f"starting again from the last checkpoint, {restarts + 1} of {args.max_restarts}")
    say(f"failed {args.max_restarts + 1} times, code {code}")
    return code


if __name__ == "__main__":
    sys.exit(main())
