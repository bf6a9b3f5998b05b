"""stackctl serve"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from stackctl.cli.common import TRAIN, BaseOption, Context, Current, command, complete_what
from stackctl.cli.engines import DEVICE, DTYPE, ENGINE, Computing, check_has_gguf
from stackctl.machine.optional_packages import check_installed

_EXAMPLES = """\
stackctl serve
stackctl serve storyteller style:0.5 --port 0 --json
stackctl serve --base smollm2 --api-key "$KEY\""""


@dataclass(frozen=True)
class Address:
    """Where the server listens, and to whom."""

    host: Annotated[str, typer.Option(help="Address to listen on.", metavar="ADDRESS")] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000
    api_key: Annotated[
        str | None,
        typer.Option(help="Key that requests to /v1 have to bring.", envvar="STACKCTL_API_KEY", metavar="KEY"),
    ] = None


def register(app: typer.Typer) -> None:
    @command(app, "serve", example=_EXAMPLES, panel=TRAIN)
    def serve(
        context: Context,
        what: Annotated[
            list[str] | None,
            typer.Argument(
                metavar="[WHAT...]",
                help="Expressions to have ready; any other on the same base is answered as well.",
                autocompletion=complete_what,
                show_default=False,
            ),
        ] = None,
        engine: ENGINE = "auto",
        *,
        address: Address,
        base: BaseOption = None,
        dtype: DTYPE = "auto",
        device: DEVICE = "auto",
    ) -> None:
        """Serve every expression of the registry under OpenAI's API, and a page to mix them.

        The model of a request is an expression such as style:0.7+instruct, a stored name, or base.
        """
        for package in ("starlette", "uvicorn"):
            check_installed(package)
        from stackctl.serving.models import Models, common_base
        from stackctl.serving.run import listen, run

        output, registry = context.output, context.registry
        computing = Computing(engine, dtype, device)
        computing.check()
        found, first = common_base(registry, what or [], base)
        models = Models(registry, found, first)
        if computing.is_llama_cpp:
            check_has_gguf(found, registry)
        ready = [models.find(text)[1] for text in first or (models.usual(),)]
        bound = listen(address.host, address.port)
        from stackctl.serving.app import Service, make_app
        from stackctl.serving.guard import Guard, is_loopback

        answering = computing.start(found, registry, output.status)
        try:
            answering.warm(ready)
            host = f"[{address.host}]" if ":" in address.host else address.host
            url = f"http://{host}:{bound.getsockname()[1]}"

            def say_ready() -> None:
                names = [row["id"] for row in models.listed()]
                if output.json_mode:
                    output.line_json({"url": url, "engine": computing.name, "base": found.name, "models": names})
                else:
                    output.text(f"{url}\n" if output.quiet else f"serving {found.name} at {url}: {', '.join(names)}\n")
                if not is_loopback(address.host) and address.api_key is None:
                    output.note(f"{address.host} can be reached from other machines, and no --api-key is asked for")

            service = Service(answering, models, Guard(address.host, address.api_key), output.status, Current.debug)
            run(make_app(service), bound, say_ready)
        finally:
            answering.close()
