"""Serves a page on which to draw or upload a conditioning image for ControlNets to follow."""

import os

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read as gradio is imported

import click
import gradio as gr

from common.errors import ConfigError
from common.provenance import write_run
from infer.config import ServeConfig
from infer.draw_service import DrawService
from infer.page import build_page

CSS = "footer {visibility: hidden}"


def serve(config: ServeConfig, *, block_thread: bool = True) -> gr.Blocks:
    """Serve the page.

    Args:
        config: settings of the page.
        block_thread: whether to return only when the page is interrupted, or at once.

    Raises:
        ConfigError: base model and ControlNets do not go together, or the port is taken.
        OSError: the output folder cannot be made.
    """
    service = DrawService(config)
    write_run(config.output_dir, "serve", config)
    page = build_page(service)
    # Requests that do not come from the page go through the queue too.
    page.queue(max_size=config.most_waiting, default_concurrency_limit=1, api_open=False)
    try:
        page.launch(
            server_name=config.host,
            server_port=config.port,
            max_file_size=f"{config.most_upload_mb}mb",
            footer_links=[],
            css=CSS,
            quiet=True,
            share=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise ConfigError(
            f"--host {config.host} --port {config.port}: cannot listen there ({error})."
        ) from error
    click.echo(
        f"http://{config.host}:{config.port}, pictures in {config.output_dir}; Ctrl-C ends it"
    )
    if block_thread:
        page.block_thread()
    return page
