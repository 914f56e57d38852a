"""The live model behind the lab: loaded once, asked one request at a time, in order, on a thread of its own."""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from moescope.core.errors import InputError, MoescopeError
from moescope.dashboard.model_loading import bytes_of, load_model, no_model, not_loaded, stoppable, stopped, told
from moescope.dashboard.model_requests import Replaced, State, Status, Ticket
from moescope.dashboard.sql.memory_bound import lifted

if TYPE_CHECKING:
    from moescope.probes.live_model import LiveModel

T = TypeVar("T")

_LOG = logging.getLogger("moescope.dashboard")
_LOOK = 0.2  # seconds between two looks of an asker at whether it still wants its answer
_PATIENCE = 5.0  # seconds after which something that was stopped and goes on is left behind


class ModelHost:
    """Holds one model and a thread that runs everything asked of it.

    Args:
        source: what `moescope.load` takes; None until a page chooses.
        load: loads a model; None for `moescope.load`, which runs no code that comes with a model.

    Example:
        >>> host = ModelHost("demo")
        >>> host.status().state, host.ask(lambda model: model.anatomy.top_k, who="example"), host.status().state
        ('unloaded', 2, 'ready')
        >>> host.unload()
    """

    def __init__(self, source: str | None = None, *, load: Callable[[str], LiveModel] | None = None) -> None:
        self.source = source
        self._load = load or load_model
        self._turn = threading.Condition()
        self._line: list[Ticket] = []
        self._running: Ticket | None = None
        self._loading = self._unload = False
        self._since = time.monotonic()
        self._problem: MoescopeError | None = None
        self._model: LiveModel | None = None
        self._model_source: str | None = None
        self._about: tuple[str, int, str] | None = None
        self._open: Callable[[], None] | None = None
        self._thread: threading.Thread | None = None

    @property
    def model(self) -> LiveModel | None:
        """The loaded model, to read what it is made of; it is run by `ask` alone. None where it is not loaded."""
        return self._model if self._model_source == self.source else None

    def ask(
        self,
        request: Callable[[LiveModel], T],
        *,
        who: str,
        words: str = "",
        still: Callable[[], None] | None = None,
        keeps: bool = False,
        before: Sequence[str] = (),
        source: str | None = None,
    ) -> T:
        """Run a request on the model, loaded first where it is not, and wait for its answer.

        Args:
            request: called with the model, on the model's own thread, when all that was asked before has ended.
            who: asks; a newer request of the same asker takes the place of one that still waits.
            words: what the model is then busy with.
            still: called a few times a second meanwhile; where it raises, the request is withdrawn, or stopped, and that is
                raised.
            keeps: it takes care of what `keep_open` left on the model; for others that is taken off before.
            before: askers whose requests give way to this one: those that wait leave the line, one that runs is stopped.
            source: another model than the chosen one; it is loaded in its place, and the chosen one again when it is asked.

        Raises:
            InputError: no model is chosen, it cannot be loaded, or another was chosen while this waited.
            Replaced: a newer request of the same asker took its place.
            Stopped: the user stopped it.
            RunError: the model failed.
        """
        if self._thread is threading.current_thread() and self._model is not None:
            return request(self._model)
        with self._turn:
            wanted = source or self.source
            if wanted is None:
                raise no_model()
            if self._problem is not None and wanted == self.source:
                raise self._problem.with_traceback(None)
            ticket = Ticket(request, who, words or who, wanted, chosen=source is None, keeps=keeps)
            self._clear_way(before)
            self._stand(ticket)
        try:
            while not ticket.over.wait(None if still is None else _LOOK):
                if still is not None:
                    still()
        except BaseException:
            self._withdraw(ticket)
            raise
        if ticket.failure is not None:
            raise ticket.failure
        answer: T = ticket.answer
        return answer

    def choose(self, source: str | None) -> None:
        """Take another model, or the same once more after it failed; it is loaded when it is first asked something."""
        with self._turn:
            self._unload = self._unload or self._model_source not in (None, source)
            self.source, self._problem, self._since = source, None, time.monotonic()
            self._turn.notify_all()

    def load(self) -> None:
        """Begin to load the chosen model, and do not wait for it."""
        with self._turn:
            if self.source is not None and self._problem is None and self.model is None:
                self._stand(Ticket(lambda _model: None, "load", "loading", self.source))

    def unload(self) -> None:
        """Let go of the model and its memory when what runs has ended; it is loaded again when it is asked something."""
        with self._turn:
            self._unload, self._problem = True, None
            self._turn.notify_all()

    def stop(self) -> None:
        """Stop what runs: it ends before the model's next block or generated token.

        A model that is being loaded, and what goes on for long after it was stopped, is left behind: the next request loads
        the model anew.
        """
        with self._turn:
            running, now = self._running, time.monotonic()
            if self._loading or (running and running.stop.is_set() and now - running.stopped_at > _PATIENCE):
                self._leave_behind()
            elif running is not None and not running.stop.is_set():
                running.stopped_at = now
                running.stop.set()

    def keep_open(self, close: Callable[[], None]) -> None:
        """From within a request: something stays on the model; `close` takes it off before one is asked that does not keep it.

        In a request that was left behind it is taken off at once.
        """
        if self._here():
            self._open = close
        else:
            close()

    def status(self) -> Status:
        """How things stand."""
        with self._turn:
            running, loaded = self._running, self._model is not None
            name, memory, device = self._about if self._about and loaded else (None, 0, "")
            state: State = "none" if self.source is None else "ready" if self.model is not None else "unloaded"
            if self._loading:
                state = "loading"
            elif self._problem is not None:
                state = "failed"
            elif running is not None:
                state = "busy"
            words = running.words if running else ""
            if self._loading and running is not None and not running.chosen:
                words = f"{running.source}, for {running.words}"
            seconds = time.monotonic() - self._since
            waiting = len(self._line)
            return Status(state, self.source, words, seconds, waiting, name, memory, device, self._problem)

    def _stand(self, ticket: Ticket) -> None:
        """Put a request into the line, in the place of one of the same asker that waits; the lock is held."""
        for place, waits in enumerate(self._line):
            if waits.who == ticket.who:
                self._line[place] = ticket
                waits.end(failure=Replaced("a newer request took the place of this one"))
                break
        else:
            self._line.append(ticket)
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._work, name="moescope-model", daemon=True)
            self._thread.start()
        self._turn.notify_all()

    def _clear_way(self, askers: Sequence[str]) -> None:
        for ticket in [waits for waits in self._line if waits.who in askers]:
            self._line.remove(ticket)
            ticket.end(failure=Replaced("a newer request took the place of this one"))
        if self._running is not None and self._running.who in askers:
            self._running.gives_way, self._running.stopped_at = True, time.monotonic()
            self._running.stop.set()

    def _withdraw(self, ticket: Ticket) -> None:
        with self._turn:
            if ticket in self._line:
                self._line.remove(ticket)
                return
            if ticket is self._running:
                ticket.stopped_at = time.monotonic()
                ticket.stop.set()
        ticket.over.wait()

    def _leave_behind(self) -> None:
        """Go on without the thread that works now; it ends by itself, and its answer is dropped. The lock is held."""
        gone = [ticket for ticket in (self._running, *self._line) if ticket is not None]
        self._line, self._running, self._loading = [], None, False
        self._thread, self._open, self._since = None, None, time.monotonic()
        self._model = self._model_source = self._about = None
        for ticket in gone:
            ticket.stop.set()
            ticket.end(failure=stopped())

    def _here(self) -> bool:
        """Whether this thread is still the one that works."""
        return self._thread is threading.current_thread()

    def _work(self) -> None:
        while True:
            with self._turn:
                while self._here() and not self._line and not self._to_drop():
                    self._turn.wait()
                if not self._here():
                    return
                drop = self._to_drop()
                ticket = self._line.pop(0) if self._line else None
                self._running, self._since = ticket, time.monotonic()
            if drop:
                self._drop()
            if ticket is not None:
                with lifted():
                    self._serve(ticket)
            with self._turn:
                if not self._here():
                    return
                self._running, self._since = None, time.monotonic()

    def _to_drop(self) -> bool:
        return self._unload and self._model is not None

    def _drop(self) -> None:
        self._let_go_or_log()
        with self._turn:
            if not self._here():
                return
            self._model = self._model_source = self._about = None
            self._unload = False
        gc.collect()

    def _serve(self, ticket: Ticket) -> None:
        try:
            if ticket.chosen and ticket.source != self.source:
                raise InputError("another model was chosen while this waited", fix="ask again")
            if self._model is not None and self._model_source != ticket.source:
                self._drop()
            model = self._ready(ticket.source)
            if not ticket.keeps and not self._let_go_or_log():
                del model  # two of them may not fit
                gc.collect()
                model = self._ready(ticket.source)
            with stoppable(model, ticket.stop):
                answer = ticket.request(model)
            ticket.end(answer)
        except BaseException as failure:  # noqa: BLE001  whatever it was, its asker must hear it, and the next have their turn
            try:
                if not isinstance(failure, MoescopeError):
                    self._let_go_or_log()
            finally:
                ticket.end(failure=told(failure))

    def _ready(self, source: str) -> LiveModel:
        """The model, loaded where it is not."""
        if self._model is not None:
            return self._model
        with self._turn:
            self._loading, self._unload = True, False
        try:
            model = self._load(source)
        except Exception as failure:  # loading may fail in any way; raised below in words
            problem = not_loaded(source, failure)
            with self._turn:
                if self._here():
                    self._failed(source, problem)
            raise problem from failure
        with self._turn:
            if not self._here():
                raise stopped()
            self._loading, self._since = False, time.monotonic()
            self._model, self._model_source = model, source
            self._about = (repr(model), bytes_of(model), str(model.device))
        return model

    def _failed(self, source: str, problem: MoescopeError) -> None:
        """Tell everybody who waits for this model; the lock is held."""
        self._loading = False
        if source == self.source:
            self._problem = problem
        for ticket in [waits for waits in self._line if waits.source == source]:
            self._line.remove(ticket)
            ticket.end(failure=problem)

    def let_go(self) -> None:
        """From within a request: take off the model what was left on it; a model from which it does not come off is dropped.

        In a request that was left behind nothing happens: what is left on the model is another's.
        """
        if not self._here() or self._open is None:
            return
        close, self._open = self._open, None
        try:
            close()
        except BaseException:
            with self._turn:
                if self._here():
                    self._model = self._model_source = self._about = None
            raise

    def _let_go_or_log(self) -> bool:
        """Whether the model is as it was loaded; where it is not, it has been dropped."""
        try:
            self.let_go()
        except BaseException:  # noqa: BLE001  whatever it was, the next request has its turn
            _LOG.exception("the edits did not come off the model, which is loaded anew")
            return False
        return True
