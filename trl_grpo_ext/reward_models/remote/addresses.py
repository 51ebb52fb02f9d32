"""Where reward servers are: urls, how they are shown, and the proxies on the way."""

import re
import urllib.request

import httpx


def parse_url(url: str) -> httpx.URL:
    """The address of a server; `ValueError` says what is wrong with one that cannot work."""
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"url {url!r} does not start with http:// or https://.")
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"url {url!r}: {error}.") from None
    if not parsed.host:
        raise ValueError(f"url {url!r} names no host.")
    if parsed.userinfo:
        raise ValueError("the url holds a user name or password, which logs would show; give `headers` instead.")
    return parsed


def slug(*parts: str) -> str:
    """A name for logs, without the characters that separate their metrics."""
    return re.sub(r"[^\w.]+", "-", "-".join(parts)).strip("-")


def address_of(url: str, path: str) -> httpx.URL:
    """The url with the protocol's path at its end, once."""
    parsed = httpx.URL(url)
    given = parsed.path.rstrip("/")
    return parsed.copy_with(path=given if given.endswith(path) else given + path)


def without_query(url: httpx.URL) -> str:
    """A url as it may be shown: its query may hold a key."""
    return str(url.copy_with(query=None))


def proxy_hint(url: httpx.URL, trust_env: bool) -> str:
    """Names the proxy that the environment puts before a url, for errors; empty without one."""
    if not trust_env or urllib.request.proxy_bypass(url.host):
        return ""
    proxies = urllib.request.getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if proxy is None:
        return ""
    # Its user and password are nobody's business
    proxy = re.sub(r"^(\w+://)?.*@", r"\1", proxy)
    return f" (through the proxy {proxy} of the environment; trust_env=False goes without it)"
