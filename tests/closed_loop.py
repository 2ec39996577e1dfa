"""Clients over kept-alive connections, each sending picture after picture until the server ends."""

from __future__ import annotations

import threading

import requests


class ClosedLoop:
    """Sends until the server says that an answer was its last one, or refuses to be connected to.

    Attributes:
        answered: The statuses that came back.
        lost: What became of the requests that were accepted and not answered.
    """

    def __init__(self, url: str, content: bytes, clients: int) -> None:
        """Start ``clients`` that post ``content`` to the server at ``url``."""
        self.answered: list[int] = []
        self.lost: list[str] = []
        self._url = f"{url}/predict"
        self._content = content
        self._ending = threading.Event()
        self._threads = [threading.Thread(target=self._send) for _ in range(clients)]
        for thread in self._threads:
            thread.start()

    def expect_end(self) -> None:
        """From now on the server may refuse new connections: it is about to be told to stop."""
        self._ending.set()

    def join(self) -> None:
        """Wait until every client has ended."""
        for thread in self._threads:
            thread.join()

    def _send(self) -> None:
        with requests.Session() as session:
            while True:
                late = self._ending.is_set()
                try:
                    answer = session.post(self._url, data=self._content, timeout=60)
                except requests.RequestException as error:
                    if not (late and "refused" in str(error)):
                        self.lost.append(str(error))
                    return
                self.answered.append(answer.status_code)
                if answer.headers.get("Connection") == "close":
                    return
