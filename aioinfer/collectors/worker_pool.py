"""The workers of a collector, as its own process sees them: their processes, and the connections to them."""

from __future__ import annotations

import atexit
import logging
import math
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing import forkserver
from typing import Any

from aioinfer.collectors import worker as worker_process
from aioinfer.collectors.worker import HostFactory, Kind
from aioinfer.errors import describe
from aioinfer.ipc.pickling import dumps, loads, pickler
from aioinfer.ipc.selector import Selector
from aioinfer.ipc.sockets import FramedSocket, frame, header, unix_socket
from aioinfer.process_server.parent import ChildProcess, describe_exit

__all__ = ["WorkerPool"]

# Seconds that a process has to exit once it has closed its connection; once it is killed; and its exit code to come.
_DISCONNECT_GRACE = 1.0
_KILL_GRACE = 2.0
_REAP_TIMEOUT = 1.0
_MOST_DESCRIPTORS = 4  # of one message

_log = logging.getLogger("aioinfer")


class WorkerPool:
    """Starts workers, and exchanges messages with them, on one thread of its own, which runs the callbacks too.

    Workers come from the fork server of :mod:`multiprocessing` where there is one. It imports torch before it forks
    the first one, so that all others start within a moment, unless the program has started it before or has named
    itself what it is to import.

    Args:
        on_message: called with a worker's index and a message of its host. A worker whose message it raises for is
            killed.
        on_exit: called once for each launch, when the process has exited and all of its messages were handed out, with
            the index and how it has ended: an exit code, a signal's name, or the traceback of what was raised in it.
            It may launch the worker again.
        on_tick: called with the time of ``time.monotonic`` when something has happened, or it was asked for; returns
            after how many seconds it wants to be called again, ``None`` for when something happens.
        host: makes a worker's host, of the configuration and a function that sends a message. It pickles.
        stop: the message that ends a host, and with it the worker. A worker whose parent is gone hands it to its host.
    """

    def __init__(
        self,
        *,
        on_message: Callable[[int, Any], None],
        on_exit: Callable[[int, str], None],
        on_tick: Callable[[float], float | None],
        host: HostFactory,
        stop: Any,
    ) -> None:
        self._on_message = on_message
        self._on_exit = on_exit
        self._on_tick = on_tick
        self._host = host
        self._stop = stop
        self._owner = os.getpid()
        self._lock = threading.Lock()  # guards the start and the end of the thread, and the making of workers
        self._thread: threading.Thread | None = None
        self._selector: Selector | None = None
        self._jobs: deque[Callable[[], None]] = deque()
        self._workers: dict[int, _Worker] = {}
        self._close_at = math.inf  # when what runs is killed

    # -- any thread ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread; once.

        Raises:
            RuntimeError: the pool was closed.
        """
        with self._lock:
            if self._close_at < math.inf:
                raise RuntimeError("the pool of workers is closed")
            if self._thread is None:
                self._selector = Selector()
                self._thread = threading.Thread(target=self._run, name="aioinfer-collector", daemon=True)
                try:
                    self._thread.start()
                except RuntimeError:  # no more threads
                    self._thread = None
                    raise
                atexit.register(self.close, 0.0)

    def call_soon(self, job: Callable[[], None]) -> None:
        """Run ``job`` on the pool's thread; never, if that has ended."""
        self._jobs.append(job)
        self._wake()

    def launch(self, index: int, config: Any) -> None:
        """Start a worker, or start it again after ``on_exit``. Does nothing if the pool is being closed.

        Args:
            index: of the worker.
            config: of its host, pickled by ``cloudpickle`` where that is installed.

        Raises:
            TypeError: it does not pickle; of its ``factories``, which one.
            RuntimeError: the worker runs.
            OSError: no descriptor is left.
        """
        payload = _pickle_config(self._host, config, self._stop)
        with self._lock:
            if self._close_at < math.inf:
                return
            if index in self._workers:
                raise RuntimeError(f"worker {index} runs")
            worker = self._workers[index] = _Worker(index)
        worker.send(frame(header(Kind.CONFIG), payload))
        self.call_soon(partial(self._start, worker))

    def send(self, index: int, message: Any, descriptors: Sequence[int] = ()) -> None:
        """Send a message to a worker's host; to a worker that does not run, nothing. Never blocks.

        Args:
            index: of the worker.
            message: that pickles.
            descriptors: four at most; the worker gets others for the same files.
        """
        worker = self._workers.get(index)
        if worker is None:
            return
        if len(descriptors) > _MOST_DESCRIPTORS:
            raise ValueError(f"a message may have {_MOST_DESCRIPTORS} descriptors, not {len(descriptors)}")
        if not worker.send(frame(header(Kind.MESSAGE, len(descriptors)), dumps(message)), descriptors):
            self._wake()  # the thread sends it when there is room

    def kill(self, index: int) -> None:
        """Kill a worker's process, if it runs; ``on_exit`` follows."""
        worker = self._workers.get(index)
        if worker is not None:
            self.call_soon(worker.kill)

    def close(self, timeout: float) -> None:
        """Wait until all workers have exited, and the thread has ended. Idempotent.

        From the pool's own thread it only begins that, and returns.

        Args:
            timeout: seconds after which workers that still run are killed.
        """
        if os.getpid() != self._owner:
            return
        deadline = time.monotonic() + timeout
        with self._lock:
            self._close_at = min(self._close_at, deadline)
            thread = self._thread
        if thread is None:
            while self._workers:
                self._workers.popitem()[1].close()
            self._jobs.clear()
            return
        self._wake()
        if thread is not threading.current_thread():
            thread.join(max(0.0, timeout) + 2 * _KILL_GRACE)
            if thread.is_alive():
                _log.warning("the thread of the collector's workers has not ended in time")
        atexit.unregister(self.close)

    def _wake(self) -> None:
        selector = self._selector
        if selector is not None:
            selector.notify()

    # -- the thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        assert self._selector is not None
        try:
            while self._workers or self._close_at == math.inf:
                for _ in range(len(self._jobs)):
                    self._call(self._jobs.popleft())
                for worker in list(self._workers.values()):
                    self._settle(worker)
                self._selector.wait(self._seconds_to_wait())
        except BaseException:
            _log.exception("the thread of the collector's workers failed; they are killed")
            self.close(0.0)
            for worker in list(self._workers.values()):
                worker.kill()
                worker.reason = "was killed, because the thread that talks to it failed"
                self._finish(worker)
        self._selector = None
        self._jobs.clear()

    def _seconds_to_wait(self) -> float | None:
        now = time.monotonic()
        wanted = self._call(self._on_tick, now)
        soonest = math.inf if wanted is None else now + wanted
        for worker in self._workers.values():
            soonest = min(soonest, worker.deadline if worker.is_killed else min(worker.deadline, self._close_at))
        if self._close_at < math.inf and not self._workers:
            soonest = now
        return None if soonest == math.inf else max(0.0, soonest - now)

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except BaseException:
            _log.exception("%s failed on the thread of the collector's workers", function)
            return None

    def _start(self, worker: _Worker) -> None:
        worker.has_exited = worker.has_exited or worker.is_killed
        if worker.has_exited:
            return
        try:
            worker.start(getattr(self._host, "__module__", ""))
        except BaseException as error:
            worker.reason = f"could not be started: {describe(error)}"
            worker.has_exited = True
            return
        assert worker.process is not None
        assert self._selector is not None
        self._selector.register(worker.sock, partial(self._receive, worker))
        self._selector.register(worker.process, worker.set_exited)

    def _settle(self, worker: _Worker) -> None:
        """Do what is due for a worker: send what waits, kill it, or report its exit."""
        selector = self._selector
        assert selector is not None
        now = time.monotonic()
        if worker.has_exited or (worker.process is None and self._close_at < math.inf):
            self._finish(worker)
        elif now >= min(worker.deadline, self._close_at):
            if worker.is_killed and now >= worker.deadline:
                worker.reason = "was killed and has not ended"
                self._finish(worker)
            elif not worker.is_killed:
                if worker.is_disconnected:
                    worker.reason = worker.reason or "has closed its connection, and was killed"
                worker.kill()
        elif worker.process is not None and not worker.is_disconnected:
            try:
                waits = worker.flush()
            except OSError as error:
                worker.reason = f"was killed, because nothing can be sent to it: {describe(error)}"
                self._disconnect(worker, 0.0)
                return
            if waits is not worker.awaits_writable:
                worker.awaits_writable = waits
                selector.register(worker.sock, partial(self._receive, worker), writable=waits)

    def _receive(self, worker: _Worker) -> None:
        if worker.is_disconnected:
            return
        try:
            worker.flush()
            _, frames = worker.sock.receive()
            for head, payload in frames:
                if head >> 60 == Kind.FAILED:
                    worker.reason = worker.reason or f"failed:\n\n{(payload or b'').decode(errors='replace')}"
                else:
                    self._on_message(worker.index, loads(payload or b""))
        except EOFError:
            self._disconnect(worker, _DISCONNECT_GRACE)
        except BaseException as error:
            _log.exception("a message of worker %d can't be handled; it is killed", worker.index)
            worker.reason = worker.reason or f"was killed, because its message can't be handled: {describe(error)}"
            self._disconnect(worker, 0.0)

    def _disconnect(self, worker: _Worker, grace: float) -> None:
        assert self._selector is not None
        self._selector.unregister(worker.sock)
        worker.is_disconnected = True
        if not worker.is_killed:
            worker.deadline = time.monotonic() + grace

    def _finish(self, worker: _Worker) -> None:
        selector = self._selector
        assert selector is not None
        while worker.process is not None and not worker.is_disconnected and worker.sock.readable():
            self._receive(worker)  # its last messages
        selector.unregister(worker.sock)
        ended = "was ended before it was started"
        if worker.process is not None:
            selector.unregister(worker.process)
            ended = describe_exit(self._call(worker.process.reap, _REAP_TIMEOUT))
        worker.has_exited = True
        worker.close()
        del self._workers[worker.index]
        self._call(self._on_exit, worker.index, worker.reason or ended)


class _Worker:
    """A worker's process and the connection to it. Any thread may call ``send``; the rest is the pool's thread's own.

    Args:
        index: of the worker.

    Attributes:
        sock: the connection. It is there before the process is, so that messages may wait for that.
        process: ``None`` until it is started.
        reason: how it has ended, where that says more than its exit code.
        has_exited: whether the process is gone.
        is_disconnected: whether nothing more is to be read.
        is_killed: whether it was killed.
        awaits_writable: whether the thread waits until there is room for what was not sent.
        deadline: when the process must have exited.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        ours, self._theirs = socket.socketpair()
        self.sock = FramedSocket(ours)
        lifeline, self._their_lifeline = socket.socketpair()
        self._lifeline = unix_socket(lifeline.detach())
        self.process: ChildProcess | None = None
        self.reason: str | None = None
        self.has_exited = self.is_disconnected = self.is_killed = self.awaits_writable = False
        self.deadline = math.inf
        self._lock = threading.Lock()  # guards what follows
        self._waiting: deque[tuple[bytes, list[int]]] = deque()  # what could not be sent, from a descriptor on

    def start(self, module: str) -> None:
        """Start the process, with ``module`` imported in the fork server, if that is started for it."""
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        if method == "forkserver":
            _preload(module)
        context: Any = multiprocessing.get_context(method)
        arguments = (self._theirs, self._their_lifeline)
        # No daemon, which could not have children: environments may start processes.
        self.process = ChildProcess(
            context, worker_process.run, arguments, name=f"aioinfer-worker-{self.index}", daemon=False
        )
        self._theirs.close()
        self._their_lifeline.close()

    def set_exited(self) -> None:
        self.has_exited = True

    def kill(self) -> None:
        if self.is_killed or self.has_exited:
            return
        self.is_killed = True
        if self.process is not None:
            self.process.kill()
            self.deadline = time.monotonic() + _KILL_GRACE

    def close(self) -> None:
        for sock in (self.sock, self._theirs, self._lifeline, self._their_lifeline):
            sock.close()
        with self._lock:
            while self._waiting:
                for descriptor in self._waiting.popleft()[1]:
                    os.close(descriptor)

    def send(self, data: bytes, descriptors: Sequence[int] = ()) -> bool:
        """Send a frame, or keep it until there is room; return whether it was sent."""
        with self._lock:
            if not self._waiting and (sent := self._send(data, descriptors)) is not None:
                return sent
            self._waiting.append((data, [os.dup(descriptor) for descriptor in descriptors]))
            return False

    def flush(self) -> bool:
        """Send what was kept, as far as there is room; return whether something is left."""
        if self.sock.unsent:
            self.sock.flush()
        with self._lock:
            while self._waiting and not self.sock.unsent:
                data, descriptors = self._waiting[0]
                if self._send(data, descriptors) is None:
                    break
                self._waiting.popleft()
                for descriptor in descriptors:
                    os.close(descriptor)
            return bool(self._waiting) or self.sock.unsent

    def _send(self, data: bytes, descriptors: Sequence[int]) -> bool | None:
        """Return whether a frame was sent whole; ``None`` if it must wait, as descriptors go with its first byte."""
        if not descriptors:
            return self.sock.send(data)
        try:
            self.sock.send_descriptors(data, descriptors)
        except BlockingIOError:
            return None
        except (BrokenPipeError, ConnectionError):  # the process is gone: the thread that receives is told
            return True
        return not self.sock.unsent


# -- the fork server ---------------------------------------------------------------------------------------


def _preload(module: str) -> None:
    """Have the fork server import what workers need before it forks them, if it has not begun.

    A program that has called ``set_forkserver_preload`` decides itself: its list is another one than that which
    ``multiprocessing`` begins with.
    """
    server: Any = getattr(forkserver, "_forkserver", None)
    if getattr(server, "_preload_modules", None) != ["__main__"]:
        return
    modules = ["__main__", "torch", worker_process.__name__, module, "gymnasium"]
    multiprocessing.set_forkserver_preload([name for name in modules if name in sys.modules])


# -- the configuration -------------------------------------------------------------------------------------


def _pickle_config(host: HostFactory, config: Any, stop: Any) -> bytes:
    dump, _ = pickler()
    try:
        return dump((host, config, stop))
    except BaseException as error:
        raise _pickling_error(config, error) from error


def _pickling_error(config: Any, error: BaseException) -> TypeError:
    dump, any_function = pickler()
    what = "the configuration of environments"
    factories: Mapping[int, Any] = getattr(config, "factories", {})
    for number, factory in factories.items():
        try:
            dump(factory)
        except BaseException as found:
            what, error = f"the factory of environment {number}, {factory!r},", found
            break
    hint = (
        "" if any_function else "; with cloudpickle installed, lambdas, closures and local functions may be factories"
    )
    return TypeError(f"{what} can't be sent to a worker's process: {describe(error)}{hint}")
