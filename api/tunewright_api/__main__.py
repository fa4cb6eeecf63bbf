"""``tunewright-api``: serves until SIGTERM, then ends the requests in flight."""

import logging
import sys

import httpx
import uvicorn
from pydantic import ValidationError

from tunewright_api.app import create_app
from tunewright_api.kube import Kube
from tunewright_api.settings import Settings


def main() -> None:
    """Reads the settings, and serves."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        settings = Settings()
        kube = Kube.connect(settings)
        app = create_app(settings, kube=kube, engines=httpx.AsyncClient(trust_env=False, limits=httpx.Limits(max_connections=1000)))
    except ValidationError as error:
        first = error.errors()[0]
        sys.exit(f"TUNEWRIGHT_{'_'.join(str(part) for part in first['loc']).upper()}: {first['msg']}")
    except (OSError, ValueError) as error:
        sys.exit(f"tunewright-api cannot start: {error}")
    uvicorn.run(
        app,
        host=settings.host,
        port=settings.port,
        access_log=False,
        log_config=None,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=settings.grace_seconds,
    )


if __name__ == "__main__":
    main()
