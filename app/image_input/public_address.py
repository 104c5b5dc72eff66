"""Whether an IP address belongs to the public internet, so that a download may connect to it.

Stricter than `ipaddress.is_global`, which differs between Python releases and is true for some addresses that
lead to internal hosts: 6to4 or NAT64 of a private address, a cloud's metadata service, multicast.
"""

import ipaddress
import socket
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address

_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
_FORBIDDEN = [
    ipaddress.ip_network(network)
    for network in (
        "192.0.0.0/24",  # IETF protocol assignments
        "192.88.99.0/24",  # 6to4 relays
        "168.63.129.16/32",  # Azure's host agent
        "2001::/23",  # IETF protocol assignments, with Teredo
        "3fff::/20",  # documentation
    )
]
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_COMPATIBLE = ipaddress.ip_network("::/96")


def is_public(text: str) -> bool:
    """Whether an address, as a resolver returns it, is public. False for text that is not an address."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if isinstance(address, IPv6Address):
        if address.scope_id is not None:
            return False
        inner = list(_inner(address))
        # mapped and NAT64 addresses mean only their IPv4 address; the outer address of a tunnel counts too
        if address.ipv4_mapped or address in _NAT64:
            return all(map(_is_public, inner))
        return all(map(_is_public, inner)) and _is_public(address)
    return _is_public(address)


def is_this_machine(text: str) -> bool:
    """Whether the address belongs to this machine, whose services must not be reached through a download.

    Connecting a datagram socket sends nothing. The kernel chooses a route, and the source address of the
    route to an address of this machine is that address.
    """
    family = socket.AF_INET6 if ":" in text else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((text, 9))
            return ipaddress.ip_address(probe.getsockname()[0]) == ipaddress.ip_address(text)
    except (OSError, ValueError):
        return False


def _is_public(address: IPv4Address | IPv6Address) -> bool:
    if isinstance(address, IPv6Address) and address not in _GLOBAL_UNICAST:
        return False
    flagged = address.is_multicast or address.is_reserved or address.is_unspecified or address.is_loopback
    return address.is_global and not flagged and not any(address in network for network in _FORBIDDEN)


def _inner(address: IPv6Address) -> Iterator[IPv4Address]:
    """Yield the IPv4 addresses that packets to this address may be sent on to."""
    if address.ipv4_mapped:
        yield address.ipv4_mapped
    if address.sixtofour:
        yield address.sixtofour
    if address.teredo:
        yield from address.teredo
    if address in _NAT64 or address in _COMPATIBLE:
        yield IPv4Address(int(address) & 0xFFFF_FFFF)
