package fetch

import (
	"crypto/tls"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Defaults of a Policy.
const (
	DefaultMaxRedirects = 3
	DefaultTimeout      = 30 * time.Second
	maxHeader           = 64 << 10 // bytes of a response's header
	maxURL              = 8 << 10  // bytes of a URL
	idleTimeout         = 30 * time.Second

	// What HTTP/2 may hold in memory for a reader that is slower than the
	// server. The defaults are 4 MiB and more.
	streamBuffer = 1 << 20
	connBuffer   = 2 << 20
)

// Policy says what may be fetched. The zero value and nil allow HTTPS from any
// host with a public address. It must not be changed once it is in use, and may
// then be used concurrently.
type Policy struct {
	// AllowHTTP permits URLs without TLS. A redirect from https to http is
	// refused even so.
	AllowHTTP bool
	// Hosts are the only hosts that may be asked, if there are any: names or
	// addresses, with a port ("h:8443", "[fe80::1]:80") if only that one is
	// meant. Case and a trailing dot do not matter; names that are not ASCII
	// are given in their xn-- form. Their addresses must be allowed, too.
	Hosts []string

	// AllowLoopback permits 127.0.0.0/8 and ::1.
	AllowLoopback bool
	// AllowPrivate permits the networks of RFC 1918 and RFC 4193: 10.0.0.0/8,
	// 172.16.0.0/12, 192.168.0.0/16 and fc00::/7.
	AllowPrivate bool
	// AllowAddrs permits the addresses in these networks, beside the public
	// ones: link-local ones, for example, or a part of the private ones. An
	// IPv4 address inside of an IPv6 one (64:ff9b::/96, RFC 6052) must be
	// allowed by itself, too.
	AllowAddrs []netip.Prefix
	// AllowFile permits file: URLs, of any file that this program may read. No
	// redirect leads to one even so.
	AllowFile bool

	// MaxRedirects is how many redirects in a row are followed; 0 means
	// DefaultMaxRedirects, less than 0 none.
	MaxRedirects int
	// Timeout limits each step before the body: connecting (with the look-up
	// of the name), the TLS handshake, the wait for the response's header. 0
	// means DefaultTimeout.
	Timeout time.Duration
	// TLS configures https, nil means the defaults of package tls. The
	// configuration is cloned.
	TLS *tls.Config
	// Resolver looks up names; nil means net.DefaultResolver.
	Resolver *net.Resolver
	// Proxy is what requests go through, as [http.ProxyURL] takes it; nil means
	// none, whatever the environment says. Its own address is not checked. It
	// looks up the names of hosts, and so it must do what AllowLoopback and
	// the like are for: only addresses that stand in a URL are checked here.
	Proxy *url.URL
}

// Client returns a new client that fetches what p allows. It takes no proxy from
// the environment, keeps no cookies, and does not ask for compressed transfer.
// The body is not limited, neither in length nor in time. The client keeps idle
// connections for 30 seconds; CloseIdleConnections ends them at once.
//
// Its errors are of type [*url.Error] and print the URL with all it contains; use
// [Do], which does not.
func (p *Policy) Client() *http.Client {
	if p == nil {
		p = &Policy{}
	}
	timeout := p.Timeout
	if timeout <= 0 {
		timeout = DefaultTimeout
	}
	dialer := &net.Dialer{
		Timeout:  timeout,
		Resolver: p.Resolver,
	}
	var proxy func(*http.Request) (*url.URL, error)
	if p.Proxy != nil {
		proxy = http.ProxyURL(p.Proxy)
	} else {
		dialer.Control = func(_, address string, _ syscall.RawConn) error { return p.checkDial(address) }
	}
	return &http.Client{
		Transport: &transport{p: p, t: &http.Transport{
			Proxy:                  proxy,
			DialContext:            dialer.DialContext,
			TLSClientConfig:        p.TLS.Clone(),
			TLSHandshakeTimeout:    timeout,
			ResponseHeaderTimeout:  timeout,
			IdleConnTimeout:        idleTimeout,
			MaxResponseHeaderBytes: maxHeader,
			DisableCompression:     true,
			ForceAttemptHTTP2:      true,
			HTTP2: &http.HTTP2Config{
				MaxReceiveBufferPerStream:     streamBuffer,
				MaxReceiveBufferPerConnection: connBuffer,
			},
		}},
		CheckRedirect: p.CheckRedirect,
	}
}

// transport checks the URL of every request, redirected or not.
type transport struct {
	p *Policy
	t *http.Transport
}

// RoundTrip implements http.RoundTripper.
func (t *transport) RoundTrip(r *http.Request) (*http.Response, error) {
	if err := t.p.checkURL(r.URL); err != nil {
		err = &Error{URL: clean(r.URL), Err: err}
		if r.Body != nil {
			r.Body.Close()
		}
		return nil, err
	}
	return t.t.RoundTrip(r)
}

// CloseIdleConnections is called by that of http.Client.
func (t *transport) CloseIdleConnections() { t.t.CloseIdleConnections() }

// checkDial checks what is about to be dialled, an address with a port.
func (p *Policy) checkDial(address string) error {
	ap, err := netip.ParseAddrPort(address)
	if err != nil {
		return because(ErrAddress, "not an address with a port")
	}
	return p.checkAddr(ap.Addr())
}

// ParseURL parses a URL that comes from outside and checks it as
// [Policy.CheckURL] does.
func (p *Policy) ParseURL(raw string) (*url.URL, error) {
	if len(raw) > maxURL {
		return nil, &Error{Err: because(ErrURL, "more than %d bytes", maxURL)}
	}
	u, err := url.Parse(raw)
	if err != nil {
		// The error of Parse quotes all of it, passwords included.
		return nil, &Error{Err: because(ErrURL, "need https://host/path")}
	}
	if err := p.CheckURL(u); err != nil {
		return nil, err
	}
	return u, nil
}

// CheckURL returns an error if u must not be requested: an [*Error] that wraps
// [ErrURL], [ErrPolicy] or, if the host is an address, [ErrAddress]. Nothing is
// looked up: of the address of a name only the client of [Policy.Client] knows.
func (p *Policy) CheckURL(u *url.URL) error {
	if p == nil {
		p = &Policy{}
	}
	check := p.checkURL
	if p.AllowFile && u.Scheme == "file" {
		check = checkFile
	}
	if err := check(u); err != nil {
		return &Error{URL: clean(u), Err: err}
	}
	return nil
}

// checkURL checks a URL that is not that of a local file.
func (p *Policy) checkURL(u *url.URL) error {
	switch {
	case u.Scheme == "":
		return because(ErrURL, "need https://")
	case u.Scheme == "http" && !p.AllowHTTP:
		return because(ErrPolicy, "need https")
	case u.Scheme != "http" && u.Scheme != "https":
		return because(ErrPolicy, "scheme %s: need https", quote(u.Scheme))
	case u.Opaque != "":
		return because(ErrURL, "need // after the scheme")
	case len(u.String()) > maxURL:
		return because(ErrURL, "more than %d bytes", maxURL)
	}
	host, port := canonical(u.Hostname()), u.Port()
	if port == "" && !strings.HasSuffix(u.Host, ":") {
		port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
	}
	addr, err := netip.ParseAddr(host)
	isAddr := err == nil
	switch n, err := strconv.ParseUint(port, 10, 16); {
	case host == "":
		return because(ErrURL, "need a host")
	case err != nil || n == 0 || port[0] == '0':
		return because(ErrURL, "port %s: need 1 to 65535", quote(port))
	case !isAddr && !isName(host):
		return because(ErrURL, "host %s: need a name of ASCII letters, digits, - and _, or an address", quote(host))
	case len(p.Hosts) > 0 && !p.listed(host, port):
		return because(ErrPolicy, "host %s is not on the list", quote(host))
	case isAddr && addr.Is4In6():
		// Nobody needs it, and it looks like another address than it is.
		return because(ErrAddress, "an IPv4 address in an IPv6 one")
	case isAddr:
		return p.checkAddr(addr)
	case host == "localhost" || strings.HasSuffix(host, ".localhost"): // RFC 6761, section 6.3
		if !p.AllowLoopback {
			return because(ErrAddress, "localhost is this device")
		}
	case numeric(host):
		// C libraries take 2130706433, 0x7f.1 and 0177.0.0.1 for addresses.
		return because(ErrAddress, "host %s: need four decimal numbers without leading zeros", quote(host))
	}
	return nil
}

// isName reports whether host can be looked up, as far as its characters go.
func isName(host string) bool {
	return len(host) <= 253 && !strings.Contains("."+host+".", "..") && !strings.ContainsFunc(host, func(r rune) bool {
		return !('a' <= r && r <= 'z' || '0' <= r && r <= '9' || strings.ContainsRune("-_.", r))
	})
}

// canonical returns a host as hosts are compared.
func canonical(host string) string {
	host = strings.TrimSuffix(strings.ToLower(host), ".")
	if a, err := netip.ParseAddr(host); err == nil {
		return a.String()
	}
	return host
}

func (p *Policy) listed(host, port string) bool {
	for _, h := range p.Hosts {
		if n, want, err := net.SplitHostPort(h); err == nil {
			if canonical(n) == host && want == port {
				return true
			}
			continue
		}
		if canonical(strings.TrimSuffix(strings.TrimPrefix(h, "["), "]")) == host {
			return true
		}
	}
	return false
}

// numeric reports whether host ends in a number, as the WHATWG URL standard (ends
// in a number checker) has it. No name does.
func numeric(host string) bool {
	last := host[strings.LastIndexByte(host, '.')+1:]
	if _, err := strconv.ParseUint(last, 10, 64); err == nil {
		return true
	}
	hex, ok := strings.CutPrefix(last, "0x")
	_, err := strconv.ParseUint(hex, 16, 64)
	return ok && (hex == "" || err == nil)
}

// CheckRedirect is for [http.Client].CheckRedirect. The client of [Policy.Client]
// has it; so should one of the caller's own. Errors are of type [*Error] and wrap
// [ErrRedirect].
//
// It removes the header Referer, which would hand on a URL that may hold a
// secret, and when the redirect leads to another origin the headers Authorization
// and Cookie. Other headers that the caller uses as a credential are not known
// here: they travel along.
func (p *Policy) CheckRedirect(r *http.Request, via []*http.Request) error {
	if p == nil {
		p = &Policy{}
	}
	if err := p.checkRedirect(r, via); err != nil {
		return &Error{URL: clean(r.URL), Err: err}
	}
	return nil
}

func (p *Policy) checkRedirect(r *http.Request, via []*http.Request) error {
	limit := max(p.MaxRedirects, 0)
	if p.MaxRedirects == 0 {
		limit = DefaultMaxRedirects
	}
	if len(via) > limit {
		return because(ErrRedirect, "more than %d", limit)
	}
	if err := p.checkURL(r.URL); err != nil {
		return because(ErrRedirect, "%w", err)
	}
	if len(via) == 0 {
		return nil
	}
	first, last := via[0].URL, via[len(via)-1].URL
	if last.Scheme == "https" && r.URL.Scheme != "https" {
		return because(ErrRedirect, "from https to http")
	}
	r.Header.Del("Referer")
	// The origin that the credentials are for is the first one.
	if r.URL.Scheme != first.Scheme || !strings.EqualFold(r.URL.Host, first.Host) {
		if r.URL.User != nil {
			return because(ErrRedirect, "with a user name")
		}
		for _, h := range []string{"Authorization", "Cookie", "Proxy-Authorization"} {
			r.Header.Del(h)
		}
	}
	return nil
}
