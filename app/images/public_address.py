"""Whether an IP address belongs to the public internet: the judgement behind every download on a caller's behalf.

Stricter than `ipaddress.is_global`, which differs between Python releases and calls global what isn't for everybody:
6to4 or NAT64 of a private address, a cloud's metadata address, multicast (docs/operations.md, "Pictures").
"""

import ipaddress
import socket
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address

_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
_FORBIDDEN = [
    ipaddress.ip_network(network)
    for network in (
        "192.0.0.0/24",  # protocol assignments
        "192.88.99.0/24",  # 6to4 relays
        "168.63.129.16/32",  # Azure's host agent
        "2001::/23",  # protocol assignments; Teredo is among them
        "3fff::/20",  # documentation
    )
]
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_COMPATIBLE = ipaddress.ip_network("::/96")


def is_public(text: str) -> bool:
    """Whether an address, as a resolver gives it, may be connected to. False for what is no address."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if isinstance(address, IPv6Address):
        if address.scope_id is not None:
            return False
        inner = list(_inner(address))
        # mapped and NAT64 addresses are nothing but their IPv4; the tunnels must be public outside, too
        if address.ipv4_mapped or address in _NAT64:
            return all(map(_is_public, inner))
        return all(map(_is_public, inner)) and _is_public(address)
    return _is_public(address)


def is_own(text: str) -> bool:
    """Whether this machine has the address: its own services are nobody's public pictures.

    Connecting a datagram socket sends nothing; the kernel only chooses the route, and to itself it goes from itself.
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
    """IPv4 addresses that packets to this one may end up at."""
    if address.ipv4_mapped:
        yield address.ipv4_mapped
    if address.sixtofour:
        yield address.sixtofour
    if address.teredo:
        yield from address.teredo
    if address in _NAT64 or address in _COMPATIBLE:
        yield IPv4Address(int(address) & 0xFFFF_FFFF)
