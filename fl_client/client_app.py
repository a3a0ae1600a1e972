"""A site as Flower's ClientApp, node and worker in one process, for tests of the whole and whoever runs Flower himself.

Apart from `fl_client.app`, because a worker process carries out orders without Flower.
"""

from functools import partial
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fl_client.app import Desk, carry_out
from fl_client.orders import answer
from fl_client.site import Site


def make_app() -> ClientApp:
    """A ClientApp with a desk of its own."""
    app, work = ClientApp(), partial(carry_out, Desk())

    def reply(message: Message, context: Context) -> Message:
        return answer(message, Site.open(Path(str(context.node_config["site"]))), work)

    app.train()(reply)
    app.evaluate()(reply)
    app.query()(reply)
    return app
