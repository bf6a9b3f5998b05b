"""stackctl serve"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from stackctl.cli.command import TRAIN, Context, Current, command
from stackctl.cli.engines import BaseOptions, Computing, check_has_gguf
from stackctl.cli.shared_options import expression, of_device
from stackctl.core.errors import Usage
from stackctl.machine.optional_packages import check_installed

if TYPE_CHECKING:
    from stackctl.serving.model_names import ModelNames

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
        str | None, typer.Option(help="Key that requests to /v1 must send.", envvar="STACKCTL_API_KEY", metavar="KEY")
    ] = None


@command("serve", example=_EXAMPLES, panel=TRAIN)
def serve(
    context: Context,
    what: Annotated[
        list[str] | None,
        expression(
            metavar="[WHAT...]", help="Expressions to have ready; any other on the same base is answered as well."
        ),
    ] = None,
    engine: Annotated[
        Literal["auto", "transformers", "llama.cpp", "vllm"],
        of_device(
            help="The inference engine. auto is transformers, in this process; llama.cpp runs a base that came "
            "from a GGUF file as it is; vllm starts vLLM, for many GPUs."
        ),
    ] = "auto",
    *,
    address: Address,
    loading: BaseOptions,
) -> None:
    """Serve every expression of the registry under OpenAI's API, and a page to mix them.

    The model of a request is an expression such as style:0.7+instruct, a stored name, or base.
    """
    for package in ("starlette", "uvicorn") if engine != "vllm" else ():
        check_installed(package)
    from stackctl.serving.model_names import ModelNames, common_base

    output, registry = context.output, context.registry
    computing = Computing(engine, loading.dtype, loading.device)
    computing.check()
    found, first = common_base(registry, what or [], loading.base)
    models = ModelNames(registry, found, first)
    if computing.is_llama_cpp:
        check_has_gguf(found, registry)
    if engine == "vllm":
        _serve_by_vllm(context, models, address, loading)
        return
    from stackctl.serving.http_server import listen, run

    ready = [models.find(text)[1] for text in first or (models.usual(),)]
    bound = listen(address.host, address.port)
    from stackctl.serving.app import App, Service
    from stackctl.serving.guard import Guard

    answering = computing.start(found, registry, output.status)
    try:
        answering.warm(ready)
        port = bound.getsockname()[1]

        service = Service(answering, models, Guard(address.host, address.api_key), output.status, Current.debug)
        run(App(service), bound, lambda: _say_ready(context, models, address, computing.name, port))
    finally:
        answering.close()


def _say_ready(context: Context, models: ModelNames, address: Address, engine: str, port: int) -> None:
    """The one line on stdout, once it answers."""
    from stackctl.serving.guard import is_loopback

    output, base = context.output, models.base.name
    host = f"[{address.host}]" if ":" in address.host else address.host
    url, names = f"http://{host}:{port}", [row["id"] for row in models.listed()]
    if output.json_mode:
        output.line_json({"url": url, "engine": engine, "base": base, "models": names})
    else:
        output.text(f"{url}\n" if output.quiet else f"serving {base} at {url}: {', '.join(names)}\n")
    if not is_loopback(address.host) and address.api_key is None:
        output.note(f"{address.host} can be reached from other machines, and no --api-key is asked for")


def _serve_by_vllm(context: Context, models: ModelNames, address: Address, loading: BaseOptions) -> None:
    """Start vLLM with the registry's expressions as its models, and wait for its end."""
    from stackctl.serving.http_server import listen
    from stackctl.serving.vllm_server import VllmOptions, check_vllm, run_vllm, vllm_line

    if loading.device != "auto":
        raise Usage("vLLM uses the devices that it was built for", hint=f"leave out --device {loading.device}")
    plans = [models.find(text)[1] for text in models.first]
    program = check_vllm(plans)
    with listen(address.host, address.port) as free:  # it is free, and vLLM takes it a moment later
        port = free.getsockname()[1]
    wanted = VllmOptions(address.host, port, address.api_key, loading.dtype)
    line = vllm_line(program, models, plans, wanted)
    context.output.status("starting " + shlex.join(line))
    run_vllm(line, context.registry.root, wanted, lambda: _say_ready(context, models, address, "vllm", port))
