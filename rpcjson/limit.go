package rpcjson

import (
	"math"
	"net"
	"net/netip"
	"sync"
	"time"
)

// Rate bounds how often something may happen: Burst times at once, and PerSecond
// in the long run. The zero value means the default.
type Rate struct {
	PerSecond float64
	Burst     int
}

// Limits bound what peers can do before they have shown who they are. A peer is an
// IPv4 address, an IPv6 network of 64 bits, or what else the transport tells apart.
// What exceeds a limit is answered with code 429 at once, and nothing is kept
// waiting. Behind a proxy all of its clients are one peer, and whoever can send
// datagrams with a false address can use up the logins of another over UDP. Nobody is
// limited with [Options].NoAuth.
type Limits struct {
	// Requests bounds the requests of one peer that the Authorizer refuses, also
	// those that only ask for a challenge; the default is 100 per second, 1000 at
	// once. TotalRequests is for all peers together; the default is four times
	// that.
	Requests, TotalRequests Rate
	// Logins bounds how often one peer may give wrong credentials; the default is
	// 6 per minute, 10 at once. TotalLogins is for all peers together, except
	// those that have given right ones lately; the default is one per second,
	// 100 at once.
	Logins, TotalLogins Rate
	// Peers is how many peers are told apart; 0 means 1024. The others share one
	// limit.
	Peers int
}

func (r Rate) or(perSecond float64, burst int) Rate {
	if r.PerSecond <= 0 || math.IsNaN(r.PerSecond) || math.IsInf(r.PerSecond, 0) {
		r.PerSecond = perSecond
	}
	if r.Burst <= 0 {
		r.Burst = burst
	}
	return r
}

// bucket fills by one with each event, and leaks.
type bucket struct {
	level float64
	at    time.Time
}

func (b *bucket) leak(r Rate, now time.Time) {
	b.level = max(0, b.level-now.Sub(b.at).Seconds()*r.PerSecond)
	b.at = now
}

func (b *bucket) full(r Rate) bool { return b.level+1 > float64(r.Burst) }

// knownFor is how long a peer that was authorized is free of TotalLogins.
const knownFor = time.Hour

// limiter applies Limits.
type limiter struct {
	o Limits

	mu               sync.Mutex
	requests, logins bucket // of all
	peers            map[string]*peerState
	others           peerState
	swept            time.Time
}

type peerState struct {
	requests, logins bucket
	known            time.Time // when it was last authorized
}

func newLimiter(o *Limits) *limiter {
	l := &limiter{peers: map[string]*peerState{}}
	if o != nil {
		l.o = *o
	}
	l.o.Requests = l.o.Requests.or(100, 1000)
	l.o.TotalRequests = l.o.TotalRequests.or(4*l.o.Requests.PerSecond, 4*l.o.Requests.Burst)
	l.o.Logins = l.o.Logins.or(0.1, 10)
	l.o.TotalLogins = l.o.TotalLogins.or(1, 100)
	if l.o.Peers <= 0 {
		l.o.Peers = 1024
	}
	return l
}

// peer returns the state of a peer, leaked until now. l.mu is held.
func (l *limiter) peer(key string, now time.Time) *peerState {
	p := l.peers[key]
	if p == nil && len(l.peers) >= l.o.Peers && now.Sub(l.swept) >= time.Second {
		l.swept = now
		for k, p := range l.peers {
			p.leak(&l.o, now)
			if p.requests.level == 0 && p.logins.level == 0 && now.Sub(p.known) > knownFor {
				delete(l.peers, k)
			}
		}
	}
	switch {
	case p != nil:
	case len(l.peers) < l.o.Peers:
		p = &peerState{}
		l.peers[key] = p
	default:
		p = &l.others
	}
	p.leak(&l.o, now)
	l.requests.leak(l.o.TotalRequests, now)
	l.logins.leak(l.o.TotalLogins, now)
	return p
}

func (p *peerState) leak(o *Limits, now time.Time) {
	p.requests.leak(o.Requests, now)
	p.logins.leak(o.Logins, now)
}

func (p *peerState) isKnown(now time.Time) bool {
	return !p.known.IsZero() && now.Sub(p.known) < knownFor
}

// blocked returns the error to be answered if peer can do nothing for now.
func (l *limiter) blocked(key string) *Error {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	return l.blockedNow(l.peer(key, now), now)
}

func (l *limiter) blockedNow(p *peerState, now time.Time) *Error {
	if p.requests.full(l.o.Requests) || l.requests.full(l.o.TotalRequests) && !p.isKnown(now) {
		return errorf(429, "too many requests without authorization")
	}
	return nil
}

// take counts a request, and a login if there are credentials in it. What turns
// out to be fine is given back.
func (l *limiter) take(key string, login bool) *Error {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	p := l.peer(key, now)
	if e := l.blockedNow(p, now); e != nil {
		return e
	}
	if login {
		free := p.isKnown(now)
		if p.logins.full(l.o.Logins) || !free && l.logins.full(l.o.TotalLogins) {
			return errorf(429, "too many failed logins")
		}
		p.logins.level++
		l.logins.level++
	}
	p.requests.level++
	l.requests.level++
	return nil
}

// give takes back n requests, and a login.
func (l *limiter) give(key string, n int, login, known bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	p := l.peer(key, now)
	back := func(b *bucket, n int) { b.level = max(0, b.level-float64(n)) }
	back(&p.requests, n)
	back(&l.requests, n)
	if login {
		back(&p.logins, 1)
		back(&l.logins, 1)
	}
	if known {
		p.known = now
	}
}

// addrKey returns what a peer at addr is told from others by.
func addrKey(addr string) string {
	host := addr
	if h, _, err := net.SplitHostPort(addr); err == nil {
		host = h
	}
	a, err := netip.ParseAddr(host)
	if err != nil {
		return addr[:min(len(addr), 64)]
	}
	a = a.Unmap().WithZone("")
	if a.Is6() {
		if p, err := a.Prefix(64); err == nil {
			return p.String()
		}
	}
	return a.String()
}

// key returns what the peer is told from others by.
func (p *Peer) key() string { return p.Channel + " " + addrKey(p.Addr) }
