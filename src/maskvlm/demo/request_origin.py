"""Checks where a request comes from: the page's own script in a browser, or a program, but never another page.

There is no login, so another page must not use the visitor's browser to get in. Each check raises `Refused` with one
line.
"""

import ipaddress
import re
import socket
from urllib.parse import urlsplit

from maskvlm.demo.refusal import Refused, Scope

Head = dict[bytes, bytes]
PASSED = frozenset(
    b"host accept accept-encoding content-type content-length if-none-match if-modified-since user-agent".split()
)
"""Headers passed on to Gradio. Others are left out because it builds URLs from X-Forwarded-*, echoes all headers of a
range request, allows other origins by its own rule on Origin, and identifies users by cookies."""
SINGLE = frozenset(
    b"host origin referer content-type content-length sec-fetch-site sec-fetch-mode sec-fetch-dest".split()
)
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+))(?::\d{1,5})?")
_ORIGIN = re.compile(r"(https?)://([^/?#@\s]+)")
DEFAULT_PORT = {"http": ":80", "https": ":443"}


def head_of(scope: Scope) -> Head:
    """The headers by name. Raises Refused: an important one is repeated, so two readers could use different values."""
    head: Head = {}
    for name, value in scope["headers"]:
        if name in head and name in SINGLE:
            raise Refused(400, f"The header {name.decode('latin-1')} must not be repeated.")
        # A header that may be repeated keeps its last value.
        head[name] = value
    return head


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, by name or by address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_address(host: str) -> bool:
    """Whether a host is an address, not a name."""
    try:
        return bool(ipaddress.ip_address(host))
    except ValueError:
        return False


def check_host(head: Head, served: str) -> None:
    """Check that the browser addressed this machine by IP address or its own name: another name may be DNS rebinding.

    Args:
        served: the address or the name that the page listens on.

    Raises:
        Refused: 400 or 421.
    """
    match = _HOST.fullmatch(header_text(head, b"host").lower())
    if match is None:
        raise Refused(400, "The header host is missing or wrong.")
    name = match[1] or match[2]
    # Loopback names cannot be rebound by an attacker's DNS.
    if is_loopback(name):
        return
    if is_loopback(served):
        raise Refused(421, "This page is served at 127.0.0.1 and localhost only.")
    # An address has no name to rebind. A name must be the one the page was started with, or the machine's own.
    if not is_address(name) and name not in {served.lower(), socket.gethostname().lower()}:
        raise Refused(421, "This page has another name. Open it by its address, or start it with --host NAME.")


def check_origin(scope: Scope, head: Head) -> None:
    """Check that the request comes from the page itself, from the address bar, or from a program.

    A browser states this in Origin, in Sec-Fetch-Site, or at least in Referer. Another port of this machine is another
    origin. Following a link to the page does not count as a request from the page with the link.

    Raises:
        Refused: 403.
    """
    host, origin, site = header_text(head, b"host"), head.get(b"origin"), header_text(head, b"sec-fetch-site")
    own = origin is None or is_own(header_text(head, b"origin"), host)
    # A link elsewhere may open the page; only its script's requests must come from the page itself.
    if not is_entry(scope, head):
        # "none": typed or bookmarked; "": a program, or a browser that does not state it.
        own = own and site in ("", "same-origin", "none")
        # A browser that sends neither of the two may send Referer.
        if origin is None and not site and b"referer" in head:
            own = own and is_own(origin_of(header_text(head, b"referer")), host)
    if not own:
        raise Refused(403, "That request comes from another page.")


def origin_of(address: str) -> str:
    """Scheme, host and port of a URL; "" if it is not valid."""
    try:
        parts = urlsplit(address)
    except ValueError:
        return ""
    return f"{parts.scheme}://{parts.netloc}"


def is_entry(scope: Scope, head: Head) -> bool:
    """Whether a browser opens the page in a tab, not in a frame and not by a script."""
    is_page = scope["method"] in ("GET", "HEAD") and scope["path"] == "/"
    # A frame has a different destination, a script a different mode.
    mode, destination = header_text(head, b"sec-fetch-mode"), header_text(head, b"sec-fetch-dest")
    return is_page and mode in ("", "navigate") and destination in ("", "document")


def is_own(origin: str, host: str) -> bool:
    """Whether an origin's host and port are those that the browser addressed. "null" never is."""
    match = _ORIGIN.fullmatch(origin.lower())
    if match is None:
        return False
    # Either side may leave out the default port.
    port = DEFAULT_PORT[match[1]]
    return match[2].removesuffix(port) == host.lower().removesuffix(port)


def check_media_type(scope: Scope, head: Head, wanted: str) -> None:
    """Check that a body has the media type that the page's script sends. Forms on other pages can send other types.

    Raises:
        Refused: 415.
    """
    kind = header_text(head, b"content-type").partition(";")[0].strip().lower()
    if scope["method"] == "POST" and kind != wanted:
        raise Refused(415, f"Only {wanted} is accepted here.")


def header_text(head: Head, name: bytes) -> str:
    """The value of a header; "" if it is missing."""
    return head.get(name, b"").decode("latin-1")
