package rpcjson

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"time"
)

// Defaults of PacketOptions.
const (
	// DefaultMaxDatagram is what mos takes (mongoose-os/mos,
	// common/mgrpc/codec/udp.go).
	DefaultMaxDatagram = 10000
	DefaultMaxSources  = 128
)

const (
	maxDatagram = 65507       // IPv4
	maxMemos    = 8           // calls remembered for each source
	memoFor     = time.Minute // how long
)

// PacketOptions configure [Server.ServePacket]. The zero value is safe.
type PacketOptions struct {
	// MaxReply bounds replies, in bytes. A longer one is replaced by an error.
	// 0 means DefaultMaxDatagram.
	MaxReply int
	// MaxCalls bounds the calls served at a time; more are dropped, as the
	// network does. 0 means 64.
	MaxCalls int
	// MaxSources bounds the addresses whose recent calls are remembered, and
	// the calls of each at a time are bounded, too. 0 means DefaultMaxSources.
	MaxSources int
	// Peer, if not nil, describes the source of each datagram that is a call, or
	// refuses it with an error; it is not answered then, nor remembered.
	Peer func(net.Addr) (Peer, error)
}

// ServePacket serves frames that come as datagrams, one frame in each, and
// answers their senders, until ctx ends, the server is closed or pc fails, which
// it returns the cause of. It closes pc. Datagrams that are no frames are ignored.
//
// Calls of methods that need more than the right Read are executed once: if the
// same datagram comes again from the same address within a minute, because it or
// the reply got lost, it gets the same reply, as long as it is among the last 8 of
// its source. Calls that were refused for there were too many are not remembered. A
// push session belongs to the address that it comes from, as the package
// documentation says.
//
// Anybody can send a datagram in the name of another address, so an address
// proves nothing. The [Authorizer] is asked about each call, with a [Peer] whose
// Channel is UDP_in; only what the frame carries in its auth member proves who
// sends it. Replies are longer than calls; do not serve the open Internet. o may
// be nil.
func (s *Server) ServePacket(ctx context.Context, pc net.PacketConn, o *PacketOptions) error {
	return s.newPacketServer(pc, o).run(ctx)
}

func (s *Server) newPacketServer(pc net.PacketConn, o *PacketOptions) *packetServer {
	p := &packetServer{s: s, pc: pc, sources: map[string]*source{}}
	if o != nil {
		p.o = *o
	}
	if p.o.MaxReply <= 0 || p.o.MaxReply > maxDatagram {
		p.o.MaxReply = DefaultMaxDatagram
	}
	if p.o.MaxCalls <= 0 {
		p.o.MaxCalls = 64
	}
	if p.o.MaxSources <= 0 {
		p.o.MaxSources = DefaultMaxSources
	}
	return p
}

func (p *packetServer) run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer context.AfterFunc(p.s.ctx, func() { cancel(ErrClosed) })()
	defer context.AfterFunc(ctx, func() { p.pc.Close() })()
	defer p.pc.Close()
	defer p.wg.Wait()
	defer cancel(nil)

	places := make(chan struct{}, p.o.MaxCalls)
	buf := make([]byte, maxDatagram)
	failures := 0
	for {
		n, addr, err := p.pc.ReadFrom(buf)
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case err != nil:
			// Some systems report here that an earlier reply was not taken.
			if failures++; errors.Is(err, net.ErrClosed) || failures > 100 {
				return fmt.Errorf("rpcjson: udp: %w", err)
			}
			continue
		}
		failures = 0
		select {
		case places <- struct{}{}:
		default:
			continue
		}
		b := bytes.Clone(buf[:n])
		p.wg.Go(func() {
			defer func() { <-places }()
			p.serve(ctx, addr, b)
		})
	}
}

// packetServer serves datagrams.
type packetServer struct {
	s  *Server
	pc net.PacketConn
	o  PacketOptions
	wg sync.WaitGroup

	mu      sync.Mutex
	sources map[string]*source
}

// source is an address that calls.
type source struct {
	last  time.Time
	calls int     // under way
	memos []*memo // oldest first
}

// memo remembers a call.
type memo struct {
	sum   [sha256.Size]byte // of the datagram
	at    time.Time
	done  bool
	reply []byte
}

// serve serves one datagram.
func (p *packetServer) serve(ctx context.Context, addr net.Addr, b []byte) {
	key := addr.String()
	f, err := p.s.parse(b)
	if err != nil || f.method == "" {
		return
	}
	peer := Peer{Channel: "UDP_in", Addr: key}
	if p.o.Peer != nil {
		// Who is refused leaves nothing behind, and gets no old reply.
		if peer, err = p.o.Peer(addr); err != nil {
			p.s.log.Warn("rpc: datagram refused", "peer", key, "err", err)
			return
		}
	}
	m := p.s.method(f.method)
	src, mem, again, ok := p.enter(key, b, f.id != "" && m != nil && m.right != Read)
	if !ok {
		if again != nil {
			p.write(again, addr)
		}
		return
	}
	defer p.leave(src)
	admitted := p.s.acquireSoon(ctx)
	send := func(reply []byte) error {
		if len(reply) > p.o.MaxReply {
			reply = appendReply(nil, &f, p.s.o.ID, nil, errorf(500, "reply of %d bytes, at most %d in a datagram", len(reply), p.o.MaxReply))
		}
		if !admitted || bytes.HasSuffix(reply, notOwnerReply) {
			p.forget(src, mem) // not executed; it may work later
		} else {
			p.remember(mem, reply)
		}
		return p.write(reply, addr)
	}
	if err := p.s.serve(ctx, &peer, &f, send, admitted); err != nil {
		p.s.log.Debug("rpc: datagram not answered", "peer", key, "err", err)
	}
}

func (p *packetServer) write(reply []byte, addr net.Addr) error {
	_, err := p.pc.WriteTo(reply, addr)
	return err
}

// enter finds out whether to serve a datagram; if not, again is the reply that it
// got before, if there is one. A call that is served has to leave; remembered
// calls have a memo.
func (p *packetServer) enter(key string, b []byte, keep bool) (src *source, mem *memo, again []byte, ok bool) {
	sum := sha256.Sum256(b)
	now := time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	src = p.sources[key]
	if src == nil {
		if !p.room(now) {
			return nil, nil, nil, false
		}
		src = &source{}
		p.sources[key] = src
	}
	src.last = now
	if keep {
		for _, m := range src.memos {
			if m.sum == sum && (!m.done || now.Sub(m.at) < memoFor) {
				return nil, nil, m.reply, false
			}
		}
	}
	if src.calls == maxMemos {
		return nil, nil, nil, false
	}
	src.calls++
	if keep {
		mem = &memo{sum: sum, at: now}
		if len(src.memos) == maxMemos {
			src.memos = slices.Delete(src.memos, 0, 1)
		}
		src.memos = append(src.memos, mem)
	}
	return src, mem, nil, true
}

// room makes room for another source. The one that was silent for longest has to
// go, unless all have calls under way.
func (p *packetServer) room(now time.Time) bool {
	if len(p.sources) < p.o.MaxSources {
		return true
	}
	oldest, key := now, ""
	for k, src := range p.sources {
		if src.calls == 0 && !src.last.After(oldest) {
			oldest, key = src.last, k
		}
	}
	if key == "" {
		return false
	}
	delete(p.sources, key)
	return true
}

func (p *packetServer) leave(src *source) {
	p.mu.Lock()
	defer p.mu.Unlock()
	src.calls--
}

func (p *packetServer) remember(m *memo, reply []byte) {
	if m == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	m.done, m.reply, m.at = true, reply, time.Now()
}

func (p *packetServer) forget(src *source, m *memo) {
	p.mu.Lock()
	defer p.mu.Unlock()
	src.memos = slices.DeleteFunc(src.memos, func(v *memo) bool { return v == m })
}

// notOwnerReply is the end of a reply that says errNotOwner.
var notOwnerReply = append(appendError([]byte(`"error":`), errNotOwner), '}')

// DatagramOptions configure [NewDatagram]. The zero value is safe.
type DatagramOptions struct {
	// Retransmit is the time after which a call without reply is sent again;
	// it doubles each time, up to four seconds. 0 means half a second, and a
	// negative value never.
	Retransmit time.Duration
	// RetransmitAll sends any call again. Without it only those are that a
	// device may well execute twice: the original executes each datagram, and a
	// second OTA.End makes it answer the first with an error. A device with
	// this package's server executes a repeated datagram once.
	RetransmitAll bool
	// ChunkSize is what [Client.Push] puts into an OTA.Write, in bytes, if its
	// caller does not say; 0 means as much as a packet of 1500 bytes can carry.
	ChunkSize int
}

// repeatable has the methods that may be executed twice.
var repeatable = []string{
	"RPC.List", "RPC.Describe", "RPC.Ping", "Sys.GetInfo", "Sys.GetUID",
	"OTA.Status", "OTA.GetBootState", "OTA.SetBootState", "OTA.Begin", "OTA.Write",
}

// Datagram is a [Channel] over datagrams.
type Datagram struct {
	dial func(context.Context) (net.Conn, error)
	o    DatagramOptions
	callTable

	dialing chan struct{} // holds an element while somebody connects
	wg      sync.WaitGroup

	mu     sync.Mutex
	conn   net.Conn
	closed bool
}

// NewDatagram returns a channel that calls dial once it needs a connection, and
// closes that with itself. Each Write of the connection must send one datagram. o
// may be nil.
func NewDatagram(dial func(context.Context) (net.Conn, error), o *DatagramOptions) *Datagram {
	d := &Datagram{dial: dial, dialing: make(chan struct{}, 1)}
	if o != nil {
		d.o = *o
	}
	if d.o.Retransmit == 0 {
		d.o.Retransmit = 500 * time.Millisecond
	}
	if d.o.ChunkSize <= 0 {
		d.o.ChunkSize = 960
	}
	return d
}

// DialUDP returns a client for the device at addr (host:port), by UDP: without
// encryption, and to be authenticated within the frames. Nothing is sent yet. Both
// options may be nil.
func DialUDP(addr string, o *ClientOptions, do *DatagramOptions) *Client {
	return NewClient(dialDatagram(addr, do), o)
}

func dialDatagram(addr string, o *DatagramOptions) *Datagram {
	d := &net.Dialer{Timeout: dialTimeout}
	return NewDatagram(func(ctx context.Context) (net.Conn, error) { return d.DialContext(ctx, "udp", addr) }, o)
}

// ChunkSize returns the size of chunks that suits datagrams.
func (d *Datagram) ChunkSize() int { return d.o.ChunkSize }

// Close ends the calls under way.
func (d *Datagram) Close() error {
	d.mu.Lock()
	c := d.conn
	d.closed, d.conn = true, nil
	d.mu.Unlock()
	var err error
	if c != nil {
		err = c.Close()
	}
	d.wg.Wait()
	return err
}

func (d *Datagram) connected(ctx context.Context) (net.Conn, error) {
	select {
	case d.dialing <- struct{}{}:
		defer func() { <-d.dialing }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	d.mu.Lock()
	c, closed := d.conn, d.closed
	d.mu.Unlock()
	switch {
	case closed:
		return nil, errChannelClosed
	case c != nil:
		return c, nil
	}
	c, err := d.dial(ctx)
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		c.Close()
		return nil, errChannelClosed
	}
	d.conn = c
	d.wg.Go(func() { d.receive(c) })
	return c, nil
}

// has reports whether c is still the connection.
func (d *Datagram) has(c net.Conn) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.conn == c
}

// receive receives until the connection is closed. Errors are news about what was
// sent, such as that nobody listens there.
func (d *Datagram) receive(c net.Conn) {
	buf := make([]byte, maxDatagram)
	for failures := 0; failures < 100; {
		n, err := c.Read(buf)
		if err != nil {
			failures++
			d.fail(err)
			if errors.Is(err, net.ErrClosed) {
				break
			}
			continue
		}
		failures = 0
		if id, method := frameID(buf[:n]); method == "" && id != "" {
			d.answer(id, answer{frame: bytes.Clone(buf[:n])})
		}
	}
	c.Close()
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.conn == c {
		d.conn = nil
	}
}

// RoundTrip implements [Channel].
func (d *Datagram) RoundTrip(ctx context.Context, frame []byte, max int) ([]byte, error) {
	frame = bytes.TrimSpace(frame)
	if len(frame) > maxDatagram {
		return nil, errorf(413, "frame of %d bytes, at most %d in a datagram", len(frame), maxDatagram)
	}
	id, method := frameID(frame)
	c, err := d.connected(ctx)
	if err != nil {
		return nil, err
	}
	reply, done, err := d.add(id)
	if err != nil {
		return nil, err
	}
	defer done()
	delay := d.o.Retransmit
	if delay > 0 && !d.o.RetransmitAll && !slices.ContainsFunc(repeatable, func(m string) bool { return strings.EqualFold(m, method) }) {
		delay = 0
	}
	var timer <-chan time.Time
	for {
		// Once the connection has gone receive tells nobody any more.
		if _, err := c.Write(frame); err != nil && (delay <= 0 || !d.has(c)) {
			return nil, err
		}
		if delay > 0 {
			t := time.NewTimer(delay)
			defer t.Stop()
			timer = t.C
			delay = min(2*delay, 4*time.Second)
		}
		select {
		case a := <-reply:
			return a.take(max)
		case <-timer:
		case <-ctx.Done():
			return nil, fmt.Errorf("nothing came back: %w", context.Cause(ctx))
		}
	}
}
