"""An order in, a report or a refusal out: the same steps in the node, in simulation and in tests.

Whoever answers holds the site's gate and its journal; the work itself is done by a function that is given: in this process
(`fl_client.app`), or in the worker process that holds no keys (`fl_client.worker`). Work is asked for after the order was
admitted, and a line in the journal is on the disk before an answer leaves. Whatever goes wrong, the coordinator learns one
public code.
"""

import logging

from flwr.app import Message

from fl_client.site import Seen, Site, Work
from privacy.errors import IsocenterError, MessageMalformed
from privacy.wire import ORDERS, Refusal, UnmaskOrder, decode

log = logging.getLogger("isocenter.site")


def answer(message: Message, site: Site, work: Work) -> Message:
    """The reply to `message`: what `work` reports, or a Refusal with the public code of whatever was raised.

    Raises MessageMalformed if `message` holds no order, because then there is nothing to refuse.
    """
    seen = Seen()
    try:
        order = decode(message, *ORDERS)
        if message.metadata.message_type != order.message_type:
            raise MessageMalformed(f"an order of kind {order.kind} in a message for other orders")
        study = site.admit(order)
        survivors = order.survivors if isinstance(order, UnmaskOrder) else ()
        report, seen = work(site, study, order), Seen(study.protection, survivors)
    except IsocenterError as error:
        log.warning("refused: %s (%s)", error.code, error)
        return refuse(message, site, error.code)
    except Exception:
        log.exception("refused: internal")
        return refuse(message, site, IsocenterError.code)
    site.note(report, seen)
    return Message(report.to_records(), reply_to=message)


def refuse(message: Message, site: Site, code: str) -> Message:
    """A refusal of the order in `message`, in the journal already; raises MessageMalformed if it holds none."""
    report = Refusal(**decode(message, *ORDERS).naming(), site=site.name, code=code)
    site.note(report)
    return Message(report.to_records(), reply_to=message)
