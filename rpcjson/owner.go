package rpcjson

import (
	"net"
	"sync"
	"time"
)

// How long a push session must be silent before somebody else may continue it
// whose connection is not the one that it belongs to.
const (
	takeoverIdle    = 10 * time.Second // the same host, without credentials
	takeoverForeign = 30 * time.Second // anybody else who may install
)

// owner is who a push session belongs to, see the package documentation.
type owner struct {
	mu    sync.Mutex
	who   caller
	calls int       // of it, under way
	last  time.Time // when there was one
}

// caller is where a call comes from.
type caller struct {
	user  string          // "" without credentials
	ended <-chan struct{} // of its connection, which that identifies; nil if there is none
	route string          // without connection: what calls of one client have in common
	host  string
}

func callerOf(r *Request) caller {
	p := r.Peer
	c := caller{user: p.User, ended: p.ended, route: p.Channel, host: p.Channel + " " + p.Addr}
	switch p.Channel {
	case "HTTP": // each call has a connection of its own, and may take another way
		c.host = host(p.Addr)
	case "MQTT": // the broker tells nothing else
		c.route += " " + p.Addr + " " + r.Src
	case "TCP", "UDP_in", "WS_in":
		c.route, c.host = c.host, host(p.Addr)
	default:
		c.route = c.host
	}
	return c
}

// same reports whether c and d certainly are one client.
func (c caller) same(d caller) bool {
	return c.user == d.user && (c.user != "" || c.ended == d.ended && (c.ended != nil || c.route == d.route))
}

func newOwner(r *Request) *owner { return &owner{who: callerOf(r), last: time.Now()} }

// errNotOwner is answered if a push session belongs to somebody else. Clients may
// try again.
var errNotOwner = errorf(503, "the push session belongs to another client")

// enter counts a call of the session, unless it belongs to somebody else. The
// caller, who has the right to install, may have become its owner.
func (s *Server) enter(p *push, r *Request) (leave func(), err error) {
	if p.over() {
		return func() {}, nil // there is nothing left to disturb
	}
	taken, ok := p.owner.enter(callerOf(r), r.Method == "OTA.Begin")
	if !ok {
		return nil, errNotOwner
	}
	if taken {
		s.log.Warn("push session continued by another client", "channel", r.Peer.Channel, "peer", r.Peer.Addr)
	}
	return p.owner.leave, nil
}

// enter counts a call by c if it may be one of the session. begin says that it
// repeats OTA.Begin: two clients may begin alike, and only one may go on.
func (o *owner) enter(c caller, begin bool) (taken, ok bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.who.same(c) || begin && c.user == "" && c.host != o.who.host {
		silent := time.Duration(0)
		if o.calls == 0 {
			silent = time.Since(o.last)
		}
		near := c.user == "" && o.who.user == "" && c.host == o.who.host
		if silent < takeoverForeign && !(near && (silent >= takeoverIdle || o.who.gone())) {
			return false, false
		}
		taken = true
	}
	o.who = c
	o.calls++
	return taken, true
}

func (o *owner) leave() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.calls--
	o.last = time.Now()
}

// gone reports whether the connection is known to have ended.
func (c caller) gone() bool {
	select {
	case <-c.ended:
		return true
	default:
		return false
	}
}

// host returns an address without its port.
func host(addr string) string {
	if h, _, err := net.SplitHostPort(addr); err == nil {
		return h
	}
	return addr
}
