"""GET / and the files of the page under /page/."""

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from llama_jax.serve.page.static import INDEX, KEY_FORM, static_files


def page_routes() -> list[Route]:
    """GET (and HEAD) / and /page/{name}."""
    files = static_files()

    async def index(request: Request) -> Response:
        return files[INDEX].response(request.headers)

    async def file(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in files or name in (INDEX, KEY_FORM):
            raise HTTPException(404)
        return files[name].response(request.headers)

    return [Route("/", index), Route("/page/{name:path}", file)]
