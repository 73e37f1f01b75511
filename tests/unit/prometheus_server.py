"""A Prometheus server that scrapes this process every second."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request

import prometheus_client
import pytest

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None,
    reason="prometheus is not installed (apt install prometheus)",
)


class Server:
    """A server that runs."""

    def __init__(self, address, process, log):
        self.address = address
        self.process = process
        self.log = log

    def ask(self, query, *, patience=60.0):
        """Ask until there is an answer, and return its series as (labels, value)."""
        url = f"http://{self.address}/api/v1/query?query={urllib.parse.quote(query)}"
        until = time.monotonic() + patience
        while time.monotonic() < until:
            assert self.process.poll() is None, self.log.read_text()
            try:
                with urllib.request.urlopen(url, timeout=10) as response:
                    result = json.load(response)["data"]["result"]
            except urllib.error.HTTPError as error:
                if error.code != 503:  # not ready
                    raise AssertionError(f"{query}: {error.read().decode()}") from error
            except (urllib.error.URLError, ConnectionError):
                pass
            else:
                if result:
                    return [(one["metric"], one["value"][1]) for one in result]
            time.sleep(0.2)
        raise AssertionError(f"{query}: the server has no answer:\n{self.log.read_text()}")


@contextlib.contextmanager
def prometheus_server(registry, folder):
    """Run a server that scrapes a registry of this process, as the job `ours`."""
    server, thread = prometheus_client.start_http_server(0, "127.0.0.1", registry)
    config, log_path = folder / "prometheus.yml", folder / "log"
    config.write_text(
        "global: {scrape_interval: 1s}\n"
        "scrape_configs:\n"
        "- job_name: ours\n"
        f"  static_configs: [{{targets: ['127.0.0.1:{server.server_port}']}}]\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder}/data"]
    with (
        log_path.open("w") as log,
        subprocess.Popen(
            [*command, f"--web.listen-address={address}"], stdout=log, stderr=log
        ) as process,
    ):
        try:
            yield Server(address, process, log_path)
        finally:
            process.terminate()
    server.shutdown()
    server.server_close()
    thread.join(60)
