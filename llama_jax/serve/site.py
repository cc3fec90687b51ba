"""What stands between the socket and the routes, and who is told of each request's end."""

from llama_jax.serve.app import create_app
from llama_jax.serve.monitoring.access_log import write_access
from llama_jax.serve.monitoring.http_metrics import handler_finder
from llama_jax.serve.monitoring.request_log import RequestLog
from llama_jax.serve.monitoring.tracing import otlp_tracing
from llama_jax.serve.protocol.limits import set_limits
from llama_jax.serve.routes.status import package_version
from llama_jax.serve.served_model import ServedModel
from llama_jax.serve.setup import Setup
from llama_jax.serve.transport.cors import Cors
from llama_jax.serve.transport.door import Door
from llama_jax.serve.transport.front import Front


class Site:
    """The layers around the application, from the outermost: front, CORS, door.

    Attributes:
      front: the outermost.
    """

    def __init__(self, setup: Setup) -> None:
        """Builds the layers, closed until there is a model.

        Raises:
          TracingError: the packages of OpenTelemetry are needed and not installed.
        """
        arguments = setup.arguments
        set_limits(arguments.max_choices, arguments.max_prompts)
        open_paths = ("/metrics",) if arguments.metrics_open else ()
        self._root_path = arguments.root_path
        self._door = Door(setup.keys, arguments.max_body_size, open_paths)
        inner: Door | Cors = self._door
        if arguments.allowed_origins:
            inner = Cors(inner, arguments.allowed_origins, arguments.allow_credentials)
        self.front = Front(inner, root_path=arguments.root_path)
        self._tracing = None
        if not arguments.disable_access_log:
            self.front.listeners.append(write_access)
        if arguments.request_log is not None:
            self.front.listeners.append(RequestLog(arguments.log_prompts))
        if arguments.otlp_traces_endpoint is not None:
            self._tracing = otlp_tracing(arguments.otlp_traces_endpoint, package_version())
            self.front.listeners.append(self._tracing)

    def open(self, served: ServedModel) -> None:
        """Passes requests on to the routes of a model from now on."""
        app = create_app(served, self._root_path)
        self.front.handler_of = handler_finder(app.routes)
        self.front.listeners.append(served.metrics.observe)
        self._door.open(app)

    def close(self) -> None:
        """Sends the traces that have not been sent."""
        if self._tracing is not None:
            self._tracing.close()
