package fetch

import (
	"net/netip"
	"slices"
	"strings"
)

// special are the networks that are not on the public internet (IANA's IPv4 and
// IPv6 Special-Purpose Address Registries), and why. Of IPv6, nothing outside of
// 2000::/3 is.
var special = []struct{ name, nets string }{
	{"unspecified", "0.0.0.0/8 ::/128"},
	{"loopback", "127.0.0.0/8 ::1/128"},
	{"private", "10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 fc00::/7"},
	{"link-local", "169.254.0.0/16 fe80::/10"},
	{"multicast", "224.0.0.0/4 ff00::/8"},
	{"shared by a provider", "100.64.0.0/10"},
	{"translated", nat64 + " 64:ff9b:1::/48 2002::/16 2001::/32 192.88.99.0/24"},
	{"reserved", "192.0.0.0/24 192.0.2.0/24 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 240.0.0.0/4 " +
		"2001::/23 2001:db8::/32 3fff::/20"},
}

const (
	global6 = "2000::/3"
	nat64   = "64:ff9b::/96" // RFC 6052, section 2.1
)

// within reports whether a is in one of the networks, which are constants.
func within(a netip.Addr, nets string) bool {
	for n := range strings.FieldsSeq(nets) {
		if netip.MustParsePrefix(n).Contains(a) {
			return true
		}
	}
	return false
}

// CheckAddr returns an error if a must not be connected to: an [*Error] that
// wraps [ErrAddress].
func (p *Policy) CheckAddr(a netip.Addr) error {
	if p == nil {
		p = &Policy{}
	}
	if err := p.checkAddr(a); err != nil {
		return &Error{Err: err}
	}
	return nil
}

func (p *Policy) checkAddr(a netip.Addr) error {
	if !a.IsValid() {
		return because(ErrAddress, "no address")
	}
	a = a.Unmap().WithZone("")
	name := kind(a)
	if name == "" || name == "loopback" && p.AllowLoopback || name == "private" && p.AllowPrivate {
		return nil
	}
	if !slices.ContainsFunc(p.AllowAddrs, func(n netip.Prefix) bool { return n.Contains(a) }) {
		return because(ErrAddress, "%v is %s", a, name)
	}
	if within(a, nat64) {
		b := a.As16()
		return p.checkAddr(netip.AddrFrom4([4]byte(b[12:])))
	}
	return nil
}

// kind says why a is not public; "" if it is.
func kind(a netip.Addr) string {
	for _, s := range special {
		if within(a, s.nets) {
			return s.name
		}
	}
	if a.Is6() && !within(a, global6) {
		return "reserved"
	}
	return ""
}
