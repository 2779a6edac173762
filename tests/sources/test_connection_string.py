"""Connection strings: what each part means, what is wrong with one, and that none leaks."""

from __future__ import annotations

import string
import time
from contextlib import suppress
from dataclasses import FrozenInstanceError
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from gridsession.errors import SettingsError
from gridsession.sources.connection_string import (
    Address,
    EmbeddedAddress,
    MemoryAddress,
    OtherAddress,
    RedisAddress,
    parse,
    redacted,
    shown,
)

MIB = 1 << 20
HOST = (("cache-1", 6379),)
TWO = (("h1", 6379), ("h2", 6380))


def redis(**parts: Any) -> RedisAddress:
    return RedisAddress(**{"kind": "standalone", "hosts": HOST} | parts)


def error_of(text: Any) -> str:
    """The error's text, with all that holds of every error checked."""
    with pytest.raises(SettingsError) as caught:
        parse(text)
    error = caught.value
    assert error.option == "connection_string"
    assert str(error).startswith("connection_string: ")
    assert error.__cause__ is None
    assert error.__context__ is None  # a first error would show in a traceback what it can't read
    return str(error)


# -- what is right ------------------------------------------------------------------------------

GOOD: list[tuple[str, Address]] = [
    ("memory:", MemoryAddress()),
    ("memory://", MemoryAddress()),
    ("MEMORY://", MemoryAddress()),
    ("embedded:", EmbeddedAddress()),
    ("embedded://", EmbeddedAddress()),
    ("embedded:///", EmbeddedAddress()),
    ("embedded:?durable=true", EmbeddedAddress(durable=True)),
    ("embedded:///var/lib/shop", EmbeddedAddress("/var/lib/shop")),
    ("embedded:/var/lib/shop", EmbeddedAddress("/var/lib/shop")),
    ("embedded:////a", EmbeddedAddress("//a")),
    ("embedded:///var/my%20shop?max_size=1GiB", EmbeddedAddress("/var/my shop", 1 << 30)),
    ("embedded:///var/my shop", EmbeddedAddress("/var/my shop")),
    ("embedded:///b%FFd", EmbeddedAddress("/b\udcffd")),  # paths are bytes
    ("embedded:///a?max_size=512MiB&durable=true", EmbeddedAddress("/a", 512 * MIB, True)),
    ("embedded:///a?max_size=2mb", EmbeddedAddress("/a", 2_002_944)),  # whole pages
    ("embedded:///a?max_size=1048576", EmbeddedAddress("/a", MIB)),
    ("embedded:///a?max_size=1048576B", EmbeddedAddress("/a", MIB)),
    ("embedded:///a?max_size=64TiB", EmbeddedAddress("/a", 1 << 46)),
    ("embedded:///a?max_size=" + "0" * 5000 + "1MiB", EmbeddedAddress("/a", MIB)),
    ("embedded:///a?max_size=3 MIB&durable=NO", EmbeddedAddress("/a", 3 * MIB)),
    ("fancy:", OtherAddress("fancy")),
    ("Fancy+grid://user:pw@h/x?y#z", OtherAddress("fancy+grid", is_url=True)),
    ("memcached://h:11211", OtherAddress("memcached", is_url=True)),
    ("postgresql://h/db", OtherAddress("postgresql", is_url=True)),
    ("redis://cache-1", redis()),
    ("REDIS://cache-1", redis()),
    ("redis://cache-1/", redis()),
    ("redis://cache-1?", redis()),
    ("redis://cache-1:7000/3", redis(hosts=(("cache-1", 7000),), db=3)),
    ("redis://cache-1?db=3", redis(db=3)),
    ("redis://my_redis.prod.", redis(hosts=(("my_redis.prod.", 6379),))),
    ("redis://10.0.0.1:6380", redis(hosts=(("10.0.0.1", 6380),))),
    ("redis://[::1]", redis(hosts=(("::1", 6379),))),
    ("redis://[FD00::0:5]:6380/1", redis(hosts=(("fd00::5", 6380),), db=1)),
    ("redis://[fe80::1%25eth0]:6380", redis(hosts=(("fe80::1%eth0", 6380),))),
    ("redis://:pw@cache-1", redis(password="pw")),
    ("redis://ann:pw@cache-1", redis(username="ann", password="pw")),
    ("redis://ann:@cache-1", redis(username="ann", password="")),  # an ACL user with nopass
    ("redis://a%3Ann:p%40%2F%3A%23%3F%25@cache-1", redis(username="a:nn", password="p@/:#?%")),
    ("redis://:50%off%zz@cache-1", redis(password="50%off%zz")),  # as redis-py reads it
    ("redis://ann:a:b@c@cache-1", redis(username="ann", password="a:b@c")),  # the last @ counts
    ("redis://:gr%C3%BCn@cache-1", redis(password="grün")),
    ("redis://:grün@cache-1", redis(password="grün")),
    ("redis://cache-1?username=ann&password=p%40w%2B", redis(username="ann", password="p@w+")),
    ("redis://cache-1?password=pw=", redis(password="pw=")),
    ("redis://:pw@cache-1?username=ann", redis(username="ann", password="pw")),
    ("redis://ann:@cache-1?password=pw", redis(username="ann", password="pw")),
    ("redis://cache-1?username=ann&password=", redis(username="ann", password="")),
    (
        "redis://cache-1/0?socket_connect_timeout=0.5&client_name=shop-web&min_replicas=2",
        redis(socket_connect_timeout=0.5, client_name="shop-web", min_replicas=2),
    ),
    (
        f"redis://cache-1/2147483647?socket_connect_timeout=3600&client_name={'a' * 100}"
        "&min_replicas=1000",
        redis(
            db=2**31 - 1, socket_connect_timeout=3600.0, client_name="a" * 100, min_replicas=1000
        ),
    ),
    ("redis://cache-1:65535", redis(hosts=(("cache-1", 65535),))),
    ("redis://cache-1:1", redis(hosts=(("cache-1", 1),))),
    (
        "bootstrapGateways=[fe80::1%25eth0]",
        redis(kind="gateways", hosts=(("fe80::1%eth0", 6379),)),
    ),
    ("rediss://cache-1", redis(tls=True)),
    (
        "rediss://cache-1?ssl_ca_certs=/etc/my%20ca.pem&ssl_certfile=/c.pem&ssl_keyfile=/k.pem"
        "&ssl_check_hostname=False&ssl_cert_reqs=required",
        redis(
            tls=True,
            ssl_ca_certs="/etc/my ca.pem",
            ssl_certfile="/c.pem",
            ssl_keyfile="/k.pem",
            ssl_check_hostname=False,
        ),
    ),
    ("rediss://cache-1?ssl_certfile=/both.pem", redis(tls=True, ssl_certfile="/both.pem")),
    ("redis+unix:///run/redis.sock", redis(hosts=(), socket_path="/run/redis.sock")),
    (
        "redis+unix://ann:pw@/run/my%20redis.sock?db=2",
        redis(hosts=(), socket_path="/run/my redis.sock", username="ann", password="pw", db=2),
    ),
    (
        "redis+sentinel://h1,h2:26380/mymaster",
        redis(kind="sentinel", hosts=(("h1", 26379), ("h2", 26380)), service="mymaster"),
    ),
    (
        "redis+sentinel://ann:pw@[::1],h2/my.master_1/4?sentinel_username=s&sentinel_password=t",
        redis(
            kind="sentinel",
            hosts=(("::1", 26379), ("h2", 26379)),
            service="my.master_1",
            db=4,
            username="ann",
            password="pw",
            sentinel_username="s",
            sentinel_password="t",
        ),
    ),
    (
        "rediss+sentinel://h1/m/?ssl_ca_certs=/ca.pem&sentinel_password=t",
        redis(
            kind="sentinel",
            hosts=(("h1", 26379),),
            service="m",
            tls=True,
            ssl_ca_certs="/ca.pem",
            sentinel_password="t",
        ),
    ),
    (
        "redis+sentinel://h1/m?sentinel_username=s&sentinel_password=",
        redis(
            kind="sentinel",
            hosts=(("h1", 26379),),
            service="m",
            sentinel_username="s",
            sentinel_password="",
        ),
    ),
    ("redis+cluster://h1,h2:6380", redis(kind="cluster", hosts=TWO)),
    ("redis+cluster://h1,h2:6380/0", redis(kind="cluster", hosts=TWO)),
    (
        "rediss+cluster://:pw@h1,h2:6380?db=0",
        redis(kind="cluster", hosts=TWO, tls=True, password="pw"),
    ),
    ("bootstrapGateways=h1,h2:6380", redis(kind="gateways", hosts=TWO)),
    ("BOOTSTRAPGATEWAYS = h1 , h2:6380 ; usesecure = TRUE ;",
     redis(kind="gateways", hosts=TWO, tls=True)),
    ("useSecure=false;bootstrapGateways=h1,[::1]:6380",
     redis(kind="gateways", hosts=(("h1", 6379), ("::1", 6380)))),
    (
        "bootstrapGateways=h1,h2:6380;useSecure=true;Username=ann;password=a+b%3Bc=d;"
        "ssl_ca_certs=/ca.pem;db=2",
        redis(
            kind="gateways",
            hosts=TWO,
            tls=True,
            username="ann",
            password="a+b;c=d",
            ssl_ca_certs="/ca.pem",
            db=2,
        ),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("text", "address"), GOOD)
def test_a_connection_string_is_understood(text: str, address: Address) -> None:
    assert parse(text) == address
    assert parse(text).notes == ()


def test_what_has_no_effect_is_noted() -> None:
    address = parse(
        "bootstrapGateways=h1:721,h2:721;useSecure=false;maxPoolSize=16;maxRequestRetries=2"
    )
    assert isinstance(address, RedisAddress)
    assert address.hosts == (("h1", 721), ("h2", 721))
    pool, retries, port = address.notes
    assert "maxPoolSize has no effect" in pool
    assert "one multiplexed connection per node" in pool
    assert "maxRequestRetries has no effect" in retries
    assert "grid_timeout" in retries
    assert "721" in port
    assert "6379" in port


def test_an_address_cannot_be_changed() -> None:
    for text in ("memory:", "embedded:", "fancy:", "redis://h"):
        with pytest.raises(FrozenInstanceError):
            parse(text).notes = ()  # type: ignore[misc]


def test_a_scheme_that_a_package_offers_is_no_slip() -> None:
    assert parse("valkey://h", offered=lambda: ["valkey"]) == OtherAddress("valkey", is_url=True)
    assert parse("redisx:a:1@b", offered=lambda: {"redisx"}) == OtherAddress("redisx")


# -- what is wrong ------------------------------------------------------------------------------

BAD: list[tuple[Any, str, str]] = [  # text, the part, the cure
    (None, "must be a str", "not NoneType"),
    (b"redis://:hunter2@h", "must be a str", "not bytes"),
    ("", "it is empty", "write embedded:///path, memory:// or redis://host:6379"),
    (" \n", "it is empty", "write embedded:"),
    (" redis://h", "begins or ends with a space", "remove it"),
    ("redis://h\n", "or a line break", "remove it"),
    ("redis://h\xa0", "begins or ends with a space", "remove it"),
    ('"redis://h"', "quotation mark", "remove the quotes"),
    ("'redis://h'", "quotation mark", "remove the quotes"),
    ("\u201credis://h\u201d", "quotation mark", "remove the quotes"),
    ("redis://h\0/0", "control", "percent-encode"),
    ("redis://:a\tb@h", "control", "percent-encode"),
    ("\ufeffredis://h", "invisible", "remove it"),
    ("embedded:///a\nb", "control", "%0A"),
    # schemes
    ("redis", "no scheme", "redis://host:6379"),
    ("embedded", "no scheme", "embedded:///path"),
    ("memory", "no scheme", "memory://"),
    ("/var/lib/shop", "no scheme", "embedded:///path"),
    ("://h", "no scheme", "redis://"),
    ("a://h", "no scheme", "redis://"),
    ("10.0.0.1:6379", "no scheme", "redis://host:6379"),
    ("cache-1:6379", "no scheme before host and port", "redis://host:6379"),
    ("cache-1:6379/0", "no scheme before host and port", "redis://host:6379"),
    ("cache-1:6379,password=pw", "no scheme before host and port", "redis://host:6379"),
    ("ann:hunter2@h", "no scheme before user", "redis://user:password@"),
    ("reddis://h", "its scheme is unknown", "did you mean redis://?"),
    ("embeded:", "its scheme is unknown", "did you mean embedded:?"),
    ("embed:///a", "its scheme is unknown", "did you mean embedded:?"),
    ("memmory:", "its scheme is unknown", "did you mean memory://?"),
    ("redis+sentinal://h/m", "its scheme is unknown", "did you mean redis+sentinel://?"),
    ("redis-sentinel://h/m", "its scheme is unknown", "did you mean redis+sentinel://?"),
    ("rediss-cluster://h", "its scheme is unknown", "did you mean rediss+cluster://?"),
    ("redis+tls://h", "its scheme is unknown", "did you mean rediss://?"),
    ("valkey://h", "its scheme is unknown", "did you mean redis://?"),
    ("valkeys://h", "its scheme is unknown", "did you mean rediss://?"),
    ("unix:///run/redis.sock", "its scheme is unknown", "did you mean redis+unix://?"),
    # memory and embedded
    ("memory:///", "memory://", "neither a path nor options"),
    ("memory:?a=1", "memory://", "neither a path nor options"),
    ("embedded://var/lib/shop", "absolute path", "three slashes"),
    ("embedded:var/lib/shop", "absolute path", "three slashes"),
    ("embedded:///a#b", "absolute path", "three slashes"),
    ("embedded:///a?b#c", "absolute path", "three slashes"),
    ("embedded:///a?size=1GiB", "no option 'size'", "there are: max_size, durable"),
    ("embedded:///a?hunter=2", "only two options", "There are: max_size, durable"),
    ("embedded:///a?x", "only two options", "There are: max_size, durable"),
    ("embedded:///a?durable=1&durable=0", "durable is named twice", "keep one"),
    ("embedded:///a?max_size=", "max_size='' is no size", "write 512MiB or 2GiB"),
    ("embedded:///a?max_size=-5MiB", "is no size", "512MiB"),
    ("embedded:///a?max_size=1.5GiB", "is no size", "512MiB"),
    ("embedded:///a?max_size=1000KiB", "max_size='1000KiB' is too small", "use 1MiB or more"),
    ("embedded:///a?max_size=0", "max_size='0'", "too small"),
    ("embedded:///a?max_size=70368744177665", "max_size='70368744177665'", "too large"),
    ("embedded:///a?max_size=99999999TiB", "max_size='99999999TiB'", "too large"),
    ("embedded:///a?max_size=" + "9" * 5000, "max_size", "too large"),
    ("embedded:///a?durable=maybe", "durable='maybe'", "write true or false"),
    ("embedded:///a?durable=", "durable=''", "write true or false"),
    ("embedded:///a%00b", "a path", "null character"),
    # host and port
    ("redis:", "two slashes follow redis:", "redis://host:6379/0"),
    ("redis:h", "two slashes follow redis:", "redis://host:6379/0"),
    ("redis://", "the host is missing", "write redis://host:6379/0"),
    ("redis:///0", "the host is missing", "write redis://host:6379/0"),
    ("redis://:6379", "host is missing", "host:6379"),
    ("redis://:pw@", "the host is missing", "write redis://"),
    ("redis://h1,h2", "more than one host", "redis+sentinel:// or redis+cluster://"),
    ("redis://h:", "the port of host", "1 to 65535"),
    ("redis://h:0", "the port of host", "1 to 65535"),
    ("redis://h:65536", "the port of host", "1 to 65535"),
    ("redis://h:-1", "the port of host", "1 to 65535"),
    ("redis://h:\u0661", "the port of host", "1 to 65535"),
    ("redis://ann:hunter2", "the port of host", "percent-encoded"),
    ("redis://::1:6379", "host is missing", "host:6379"),
    ("redis://fd00::1:6379", "more than one ':'", "[::1]:6379"),
    ("redis://[::g]:6379", "no IPv6 address", "[::1]:6379"),
    ("redis://[::1%25]:6379", "no IPv6 address", "[::1]:6379"),
    ("redis://[::1]6379", "host", "percent-encoded"),
    ("redis://a b", "host is neither", "letters, digits"),
    ("redis://a..b", "host is neither", "letters, digits"),
    ("redis://b\xfccher", "host is neither", "letters, digits"),
    ("redis://6379", "host is neither", "an IP address"),
    ("redis://10.0.0.256", "host is neither", "an IP address"),
    ("redis+cluster://h1,,h3", "host 2 of 3 is missing", "host:6379"),
    ("redis+cluster://h1,h2:x", "the port of host 2 of 2", "1 to 65535"),
    ("redis+cluster://h1,h2,H1", "host 3 of 3 is the same as host 1 of 3", "name each once"),
    # user and password
    ("redis://hunter2@h", "no ':' stands before the @", ":password@ or user:password@"),
    ("redis://@h", "before the @ are empty", "or remove the @"),
    ("redis://:@h", "before the @ are empty", "or remove the @"),
    ("redis://:hun/ter2@h", "an @ stands behind the first / or ?", "/ is %2F"),
    ("redis://:hun?ter2@h", "an @ stands behind the first / or ?", "? is %3F"),
    ("redis://:hun#ter2@h", "a #", "# is %23"),
    ("redis://h/0?password=a@b", "an @", "%40"),
    ("redis://h/0?password=a+b", "a +", "%2B for a plus, %20 for a space"),
    ("redis://h/0?password=a#b", "a #", "# is %23"),
    ("redis://h/0?password=abc&", "option 2 after the ? is unknown", "& is %26"),
    ("redis://h/0?password=", "password is empty", "remove the option"),
    ("redis://h/0?username=ann", "username needs a password", "add password="),
    ("redis://:%ff@h", "the password before the @ is not UTF-8", "encode each byte"),
    ("redis://%ff:a@h", "the user before the @ is not UTF-8", "encode each byte"),
    ("redis://h?password=%ff", "password is not UTF-8", "encode each byte"),
    ("redis://:\udcff@h", "it is not UTF-8", "percent-encode"),
    ("redis://:a@h?password=b", "password is named twice", "before the @ and as an option"),
    ("redis://ann:a@h?username=b", "username is named twice", "before the @ and as an option"),
    # db
    ("redis://h/x", "db must be a whole number", "redis://host:6379/0"),
    ("redis://h/0/", "db must be a whole number", "redis://host:6379/0"),
    ("redis://h/-1", "db must be a whole number", "redis://host:6379/0"),
    ("redis://h/" + "9" * 5000, "db must be a whole number", "redis://host:6379/0"),
    ("redis://h?db=2147483648", "db must be a whole number", "from 0 on"),
    ("redis://h?db=x", "db must be a whole number", "redis://host:6379/0"),
    ("redis://h/1?db=1", "db is named twice", "keep one"),
    ("redis+cluster://h/1", "db can only be 0", "cluster"),
    ("redis+cluster://h?db=1", "db can only be 0", "cluster"),
    # options
    ("redis://h?clientname=x", "option 1 after the ? is unknown", "did you mean client_name?"),
    ("redis://h?db=0&pasword=x", "option 2 after the ? is unknown", "did you mean password?"),
    ("redis://h?zzz=x", "option 1 after the ? is unknown", "There are: username, password, db,"),
    ("redis://h?db=0&db=0", "db is named twice", "keep one"),
    ("redis://h?db", "db has no value", "write db=…"),
    ("redis://h?username=a&password", "password has no value", "write password=…"),
    ("redis://h?client_name=", "client_name has no value", "or remove it"),
    ("redis://h?client_name=a%20b", "client_name", "no spaces"),
    ("redis://h?client_name=" + "a" * 101, "client_name", "up to 100"),
    ("redis://h?protocol=3", "no option protocol", "RESP3 is always used"),
    ("redis://h?ssl=true", "no option ssl", "rediss://"),
    ("redis://h?tls=true", "no option tls", "rediss+sentinel://"),
    ("redis://h?socket_timeout=1", "no option socket_timeout", "grid_timeout"),
    ("redis://h?max_connections=9", "no option max_connections", "remove it"),
    ("redis://h?min_replicas=1001", "min_replicas must be a whole number", "from 0 to 1000"),
    ("redis://h?min_replicas=-1", "min_replicas must be a whole number", "from 0 to"),
    ("redis://h?min_replicas=1.5", "min_replicas must be a whole number", "from 0 to"),
    ("redis://h?socket_connect_timeout=0", "socket_connect_timeout", "more than 0"),
    ("redis://h?socket_connect_timeout=soon", "socket_connect_timeout", "number of seconds"),
    ("redis://h?socket_connect_timeout=nan", "socket_connect_timeout", "as in 0.5"),
    ("redis://h?socket_connect_timeout=-1", "socket_connect_timeout", "number of seconds"),
    ("redis://h?socket_connect_timeout=3601", "socket_connect_timeout", "at most 3600"),
    # TLS
    ("redis://h?ssl_ca_certs=/ca", "ssl_ca_certs is for TLS", "write rediss://"),
    ("redis://h?ssl_cert_reqs=required", "ssl_cert_reqs is for TLS", "write rediss://"),
    ("redis+sentinel://h/m?ssl_certfile=/c", "ssl_certfile is for TLS", "rediss+sentinel://"),
    ("redis+cluster://h?ssl_keyfile=/k", "ssl_keyfile is for TLS", "rediss+cluster://"),
    ("redis+unix:///s?ssl_ca_certs=/ca", "ssl_ca_certs is for TLS", "remove it"),
    ("rediss://h?ssl_keyfile=/k", "ssl_keyfile needs ssl_certfile", "needs"),
    ("rediss://h?ssl_check_hostname=maybe", "ssl_check_hostname", "write true or false"),
    ("rediss://h?ssl_cert_reqs=none", "ssl_cert_reqs can only be required", "ssl_ca_certs"),
    ("rediss://h?ssl_cert_reqs=optional", "ssl_cert_reqs can only be required", "ssl_ca_certs"),
    ("rediss://h?ssl_ca_certs=%00", "ssl_ca_certs", "null character"),
    ("rediss+unix:///s", "its scheme is unknown", "did you mean redis+unix://?"),
    # sockets
    ("redis+unix://", "the socket's path", "redis+unix:///run/redis.sock"),
    ("redis+unix:///", "the socket's path", "redis+unix:///run/redis.sock"),
    ("redis+unix:///run/", "the socket's path", "redis+unix:///run/redis.sock"),
    ("redis+unix://run/redis.sock", "the socket's path", "three slashes"),
    ("redis+unix:///a%00b", "the socket's path", "null character"),
    # sentinels
    ("redis+sentinel://h1,h2", "the service is missing", "h2:26379/mymaster"),
    ("redis+sentinel://h1,h2/", "the service is missing", "h2:26379/mymaster"),
    ("redis+sentinel://h1//0", "the service is missing", "h2:26379/mymaster"),
    ("redis+sentinel://h1/0", "a number stands where the service does", "mymaster/0"),
    ("redis+sentinel://h1/a%20b", "the service may have", "letters, digits"),
    ("redis+sentinel://h1/m/x", "db must be a whole number", "redis://host:6379/0"),
    ("redis+sentinel://h1/m/1?db=1", "db is named twice", "keep one"),
    ("redis+sentinel://h1/m?sentinel_username=x", "sentinel_username", "needs sentinel_password"),
    ("redis+sentinel://h1/m?sentinel_password=", "sentinel_password is empty", "write it"),
    ("redis+sentinel://h1?service_name=m", "no option service_name", "after the hosts"),
    ("redis://h?sentinel_password=x", "sentinel_password is for redis+sentinel://", "remove it"),
    # gateways
    ("useSecure=true", "bootstrapGateways is missing", "bootstrapGateways=h1:6379,h2:6379"),
    ("bootstrapGateways=", "bootstrapGateways has no value", "write bootstrapGateways="),
    ("bootstrapGateways=h1,,h2", "host 2 of 3 is missing", "host:6379"),
    ("bootstrapGateways=h1:x", "the port of host", "bootstrapGateways=h1:6379"),
    ("bootstrapGateways=:pw@h1", "bootstrapGateways has an @", ";username=…;password=…"),
    ("bootstrapGateways=redis://h1", "the port of host", "bootstrapGateways=h1:6379"),
    ("bootstrapGateway=h1", "option 1 between", "did you mean bootstrapGateways?"),
    ("bootstrapGateways=h1;pasword=x", "option 2 between", "did you mean password?"),
    ("bootstrapGateways=h1;zzz", "option 2 between the semicolons", "; is %3B"),
    ("bootstrapGateways=h1;BootstrapGateways=h2", "bootstrapGateways is named twice", "keep one"),
    ("bootstrapGateways=h1;useSecure", "useSecure has no value", "write useSecure=…"),
    ("bootstrapGateways=h1;username=a;password", "password has no value", "write password=…"),
    ("bootstrapGateways=h1;protocol=3", "no option protocol", "RESP3 is always used"),
    ("bootstrapGateways=h1;useSecure='true'", "useSecure is in quotes", "remove them"),
    ('bootstrapGateways=h1;hunter2="x"', "a value is in quotes", "remove them"),
    ("bootstrapGateways=h1;useSecure=maybe", "useSecure", "write true or false"),
    ("bootstrapGateways=h1;maxPoolSize=0", "maxPoolSize", "whole number of 1 or more"),
    ("bootstrapGateways=h1;maxPoolSize=many", "maxPoolSize", "whole number of 1 or more"),
    ("bootstrapGateways=h1;maxRequestRetries=-1", "maxRequestRetries", "of 0 or more"),
    ("bootstrapGateways=h1;ssl=1", "no option ssl", "write useSecure=true"),
    ("bootstrapGateways=h1;ssl_ca_certs=/c", "ssl_ca_certs is for TLS", "useSecure=true"),
    ("bootstrapGateways=h1;password='a;b'", "password is in quotes", "write ; as %3B"),
    ("bootstrapGateways=h1;sentinel_password=x", "option 2 between", "There are:"),
    ("bootstrapGateways=h1;password=\udcff", "it is not UTF-8", "percent-encode"),
    ("bootstrapGateways=h1;db=x", "db must be a whole number", "0"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "part", "cure"), BAD)
def test_what_is_wrong_is_named_with_its_cure(text: Any, part: str, cure: str) -> None:
    error = error_of(text)
    assert part in error
    assert cure in error
    assert "unter" not in error
    assert "ter2" not in error


# -- shown --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("memory:", "memory://"),
        ("embedded:?durable=true", "embedded:"),
        ("embedded:/var/my shop?max_size=1GiB", "embedded:///var/my%20shop"),
        ("embedded:///b%FFd", "embedded:///b%FFd"),
        ("fancy://ann:pw@h/secret", "fancy://***"),
        ("ann:pw", "***"),  # no scheme, but a user
        ("redis://cache-1", "redis://cache-1:6379/0"),
        ("redis://:pw@cache-1", "redis://***@cache-1:6379/0"),
        ("redis://ann:@cache-1", "redis://***@cache-1:6379/0"),
        ("rediss://cache-1/3?username=ann&password=pw", "rediss://***@cache-1:6379/3"),
        ("redis://[fe80::1%25eth0]", "redis://[fe80::1%25eth0]:6379/0"),
        ("redis+unix://:pw@/run/my%20s?db=2", "redis+unix://***@/run/my%20s?db=2"),
        ("redis+unix:///run/s", "redis+unix:///run/s"),
        ("rediss+sentinel://:p@h1,h2/m", "rediss+sentinel://***@h1:26379,h2:26379/m/0"),
        ("redis+cluster://h1,h2", "redis+cluster://h1:6379,h2:6379"),
        ("bootstrapGateways=h1;useSecure=true", "bootstrapGateways=h1:6379;useSecure=true"),
        (
            "bootstrapGateways=h1;db=2;password=pw",
            "bootstrapGateways=h1:6379;useSecure=false;db=2;***",
        ),
    ],
)
def test_an_address_is_shown_without_its_secrets(text: str, expected: str) -> None:
    address = parse(text)
    assert shown(address) == expected
    if isinstance(address, RedisAddress):
        assert repr(address) == str(address) == f"{address}" == f"RedisAddress({expected!r})"


def test_other_addresses_have_a_repr() -> None:
    assert repr(redis(username="ann")) == "RedisAddress('redis://***@cache-1:6379/0')"
    assert repr(MemoryAddress()) == "MemoryAddress()"
    assert repr(parse("fancy://ann:pw@h")) == "OtherAddress('fancy://***')"
    assert repr(parse("ann:pw")) == "OtherAddress('***')"
    assert repr(parse("embedded:///a?max_size=1MiB")) == (
        "EmbeddedAddress('embedded:///a', max_size=1048576, durable=False)"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("memory://", "memory://"),
        ("embedded:", "embedded:"),
        ("embedded", "embedded"),
        ("embedded:///srv/a@b?max_size=1GiB", "embedded:///srv/a@b?***"),
        ("embedded:///a#b", "embedded:///a#***"),
        ("embedded://ann:pw@h/a", "embedded://***@h/a"),
        ("redis://host", "redis://host"),
        ("redis://:pw@host:6379/0", "redis://***@host:6379/0"),
        ("redis://:p@w@host:6379/0", "redis://***@host:6379/0"),
        ("REDIS://:pw@[::1]:6379/0?db=1", "REDIS://***@[::1]:6379/0?***"),
        ("redis+sentinel://h1,h2/service", "redis+sentinel://h1,h2/service"),
        ("redis+sentinel://:pw@h1:1,h2/service/3", "redis+sentinel://***@h1:1,h2/service/3"),
        ("redis+unix://:pw@/run/redis.sock?db=1", "redis+unix://***@/run/redis.sock?***"),
        ("bootstrapGateways=h:721", "bootstrapGateways=***"),
        ("bootstrapGateways=h:721;password=pw", "bootstrapGateways=***;***"),
        # not well-formed, so that anything may be a part of a password
        ("hunter2", "***"),
        ("ann:hunter2@host", "***"),
        ("redis:ann:hunter2@host", "redis:***@host"),
        ("redis://:hunter2", "redis://***"),
        ("redis://ann:hunter2", "redis://***"),
        ("redis://host/hunter2", "redis://host/***"),
        ("redis://host#hunter2", "redis://host#***"),
        ("redis://:hun/ter2@host", "redis://***"),
        ("redis://host?password=x@hunter2", "redis://***"),
        ("redis+unix:///run:hunter2@h", "redis+unix://***"),
        ("hunter2=x", "***"),
        ("hunter=x;y", "***=***;***"),
        (" redis://:hunter2@host", "***"),
        ("jdbc:redis://:hunter2@host", "***"),
        ("reddis://:hunter2@host/0", "reddis://***@host/***"),
    ],
)
def test_a_connection_string_is_redacted(text: str, expected: str) -> None:
    assert redacted(text) == expected


# -- any text -----------------------------------------------------------------------------------

PIECES = st.sampled_from(
    [
        *("redis", "rediss", "redis+unix", "redis+sentinel", "redis+cluster", "embedded", "memory"),
        *("bootstrapGateways", "useSecure", "maxPoolSize", "password", "username", "db", "durable"),
        *("ssl_ca_certs", "ssl_check_hostname", "socket_connect_timeout", "max_size", "true"),
        *("://", ":", "//", "/", "?", "&", "=", ";", "@", ",", "#", "[", "]", "%", "+", ".", "'"),
        *("::1", "h1", "6379", "721", "0", "9" * 5000, "%00", "%ff", "\udcff", "\n", " ", "\u0663"),
    ]
)
ANY = st.one_of(st.text(), st.lists(PIECES, max_size=14).map("".join))
REDIS_ANY = st.builds(
    "{}://{}".format, st.sampled_from(["redis", "redis+unix", "redis+sentinel"]), ANY
)


@given(st.one_of(ANY, REDIS_ANY, ANY.map("bootstrapGateways={}".format)))
@example("redis://[::1\u2100]")  # a host that urlsplit raises ValueError for
@example("embedded://[/a")
def test_any_text_is_an_address_or_an_error(text: str) -> None:
    assert isinstance(redacted(text), str)
    address = None
    with suppress(SettingsError):
        address = parse(text)
    if address is None:
        error_of(text)
        return
    assert shown(address)
    assert repr(address)
    assert hash(address) == hash(parse(text))


def test_a_long_text_is_read_quickly() -> None:
    began = time.perf_counter()
    for unit in ("a", ",a", "/", "@", "?a=", "[", "a:", "%", "=", ";a", "&", " =", ".", "1"):
        for start in ("", "redis://", "redis+sentinel://", "bootstrapGateways=", "embedded:///a?"):
            text = start + unit * 20_000
            redacted(text)
            with suppress(SettingsError):
                parse(text)
    assert time.perf_counter() - began < 20.0  # 1 s; a pattern that backtracks takes minutes


# -- secrets ------------------------------------------------------------------------------------

# Each piece holds one of the marks, wherever a special character may cut the password.
MARKS = ("Qx7", "wZ9", "9Kv")
SPECIAL = st.text(st.sampled_from(string.punctuation + " \u00fc\u20ac\u3042"), max_size=3)
PASSWORDS = st.lists(
    st.tuples(SPECIAL, st.sampled_from(MARKS), SPECIAL), min_size=1, max_size=4
).map(lambda parts: "".join(map("".join, parts)))
PLACES = [
    "redis://:{}@h1:6379/0",
    "redis://{}:{}@h1:6379/0",
    "redis://{}:@h1",
    "redis://{}@h1",
    "rediss://ann:{}@h1?ssl_check_hostname=maybe",
    "redis:{}@h1",
    "redis://:{}@h1:port",
    "redis://h1/0?password={}",
    "redis://h1/0?db=1&password={}",
    "redis://h1?username={}&password={}&db=1",
    "redis://h1?passwd={}",
    "redis://:a@h1?password={}",
    "redis+unix://:{}@/run/redis.sock",
    "redis+unix:///run/redis.sock?password={}",
    "redis+sentinel://ann:{}@h1,h2/mymaster/0",
    "redis+sentinel://h1,h2/mymaster?sentinel_password={}",
    "redis+sentinel://h1/mymaster?sentinel_username={}&sentinel_password={}",
    "redis+cluster://:{}@h1,h2",
    "redis+cluster://:{}@h1,h1",
    "bootstrapGateways=h1:721;password={}",
    "bootstrapGateways=h1:721;username={};password={};useSecure=false",
    "password={};bootstrapGateways=h1:721",
    "bootstrapGateways=:{}@h1:721",
    "bootstrapGateways=h1:721;passwd={}",
    "redis://:{}@",
    "redis://h1/0#{}",
    "reddis://:{}@h1/0",
    "fancy://:{}@h1/0",
    " redis://:{}@h1",
    "'redis://:{}@h1'",
]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("encode", [False, True])
@given(password=PASSWORDS)
def test_a_password_is_never_shown(place: str, encode: bool, password: str) -> None:
    text = place.replace("{}", quote(password, safe="") if encode else password)
    seen = [redacted(text)]
    try:
        address = parse(text)
    except SettingsError as error:
        seen += [str(error), repr(error)]
    else:
        seen += [shown(address), repr(address), *address.notes]
    for mark in MARKS:
        assert mark not in "".join(seen)


@pytest.mark.parametrize(
    "place",
    [
        "redis://:{}@h1",
        "redis+unix://:{}@/run/redis.sock",
        "redis+sentinel://:{}@h1,h2/m/0",
        "redis://h1?password={}",
        "bootstrapGateways=h1;password={}",
    ],
)
@given(password=st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_an_encoded_password_arrives_whole(place: str, password: str) -> None:
    address = parse(place.replace("{}", quote(password, safe="")))
    assert isinstance(address, RedisAddress)
    assert address.password == password


@given(password=st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1))
def test_a_password_as_it_is_arrives_whole_or_is_refused(password: str) -> None:
    """Without the percent sign: nobody can tell whether that was meant to encode something."""
    assume("%" not in password)
    for place in ("redis://:{}@h1", "redis://h1?password={}"):
        try:
            address = parse(place.replace("{}", password))
        except SettingsError:
            continue
        assert isinstance(address, RedisAddress)
        assert address.password == password


# -- shown and read again -----------------------------------------------------------------------

NAMES = st.from_regex(r"[a-z][a-z0-9_-]{0,8}[a-z0-9]", fullmatch=True)
ADDRESSES = st.one_of(NAMES, st.ip_addresses(v=4).map(str), st.ip_addresses(v=6).map(str))
LOCATIONS = st.tuples(ADDRESSES, st.integers(1, 65535))
SEVERAL = st.lists(LOCATIONS, min_size=1, max_size=4, unique=True).map(tuple)
DBS = st.integers(0, 2**31 - 1)
PATHS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0/"), min_size=1)


@given(
    st.one_of(
        st.builds(
            RedisAddress,
            kind=st.just("standalone"),
            hosts=st.tuples(LOCATIONS),
            tls=st.booleans(),
            db=DBS,
        ),
        st.builds(
            RedisAddress, kind=st.just("standalone"), socket_path=PATHS.map("/{}".format), db=DBS
        ),
        st.builds(
            RedisAddress,
            kind=st.just("sentinel"),
            hosts=SEVERAL,
            tls=st.booleans(),
            service=NAMES,
            db=DBS,
        ),
        st.builds(RedisAddress, kind=st.just("cluster"), hosts=SEVERAL, tls=st.booleans()),
        st.builds(EmbeddedAddress, path=PATHS.map("/{}".format)),
    )
)
def test_what_is_shown_reads_as_the_same_address(address: Address) -> None:
    assert parse(shown(address)) == address
