"""An S3 server on this machine."""

from __future__ import annotations

import logging
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def s3_server(port: int = 0, bucket: str | None = "bucket") -> Iterator[int]:
    """moto's server with an empty bucket; the objects live as long as it. Yields its port."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    try:
        if bucket is not None:
            url = f"http://127.0.0.1:{port}/{bucket}"
            urllib.request.urlopen(urllib.request.Request(url, method="PUT")).close()
        yield port
    finally:
        server.stop()


def s3_environment(port: int) -> dict[str, str]:
    """What makes s3:// the server on this port."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "hunter2",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
