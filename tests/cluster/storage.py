"""An S3 server with signatures, multipart and ranges: versitygw on a folder."""

import http.client

from .build import program_path
from .places import Places
from .record import S3
from .services import Service

REGION = "us-east-1"


def service(at: Places, port: int, s3: S3, *, reachable_from_pods: bool) -> Service:
    """The S3 server; its root account is the cluster's one account."""
    folder = at.state / "s3"
    folder.mkdir(parents=True, exist_ok=True)
    address = "0.0.0.0" if reachable_from_pods else "127.0.0.1"
    command = [str(program_path("versitygw")), "--port", f"{address}:{port}", "--region", REGION, "--quiet", "posix", str(folder)]
    keys = {"ROOT_ACCESS_KEY": s3.access_key, "ROOT_SECRET_KEY": s3.secret_key}
    return Service("s3", command, ready=lambda: speaks_s3(port), environment=keys)


def speaks_s3(port: int) -> bool:
    """Any answer will do: an unsigned request is refused, but by a server that works."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/")
        return connection.getresponse().status < 500
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
